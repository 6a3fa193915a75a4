"""Rate-distortion curves: what every rank loses, and that nothing loses less.

Shapes: M rows and N columns of the weight W, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.algebra.factors import (
    best_factors,
    exact_factors,
    gram_eigenvectors,
    singular_squares,
)
from tensorize.algebra.metric import Metric, average
from tensorize.algebra.reconstruct import reconstruct
from tensorize.base.errors import AnalysisError
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import (
    DENSE,
    LOW_RANK,
    TT,
    TTSpec,
)
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.formats import UNASKED, formats_by_site
from tensorize.passes.curves.metric import DAMPING, shrinkage, shrinkage_of_noise, site_metrics
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.observe.moments import Moments, Term

quick = settings(max_examples=30, deadline=None, derandomize=True)

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9), "one row": (1, 6), "column": (6, 1)}
METRICS = ("frobenius", "input", "loss")
BOTH = (DENSE, LOW_RANK)


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(width: int, seed: int, diagonal: bool = False) -> Tensor:
    """A second moment whose eigenvalues span four decades."""
    rows = draw((3 * width, width), seed) * torch.logspace(0, -2, width, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(draw((width, width), seed + 1))[0]
    full = rows.t() @ rows / len(rows)
    return full.diagonal().clone() if diagonal else full


def site(m: int, n: int, experts: int = 0, uses: Sequence[Use] = ()) -> Site:
    shape = (experts, m, n) if experts else (m, n)
    return Site("layer.weight", shape, "float64", tuple(uses) or (Use("linear", "columns"),))


def paying(m: int, n: int) -> int:
    """The largest rank that saves parameters."""
    return max(1, (m * n - 1) // (m + n))


SAMPLES = 100


def moments_of(m: int, n: int, metric: str, *, diagonal: bool = False, seed: int = 1) -> Moments:
    if metric == "frobenius":
        return Moments()
    rows = moment(m, seed + 10, diagonal) if metric == "loss" else None
    return Moments({"columns": Term("columns", rows, moment(n, seed + 20, diagonal), SAMPLES)})


def damped(moments: Tensor | None, width: int, samples: int) -> Tensor:
    if moments is None:
        return torch.eye(width, dtype=torch.float64)
    identity = torch.eye(width, dtype=torch.float64)
    if moments.dim() == 1:
        return moments.diag() + 0.05 * moments.mean() * identity
    share = shrinkage(moments, samples)
    return (1 - share) * moments + (share + DAMPING) * moments.diagonal().mean() * identity


def lost(delta: Tensor, moments: Moments, metric: str) -> float:
    """Σ over the terms of tr(R ΔW K ΔWᵀ), half of it in the loss metric; written out."""
    if not moments.terms:
        return float(delta.square().sum())
    total = 0.0
    for matrix in delta if delta.dim() == 3 else [delta]:
        for term in moments.terms.values():
            rows = damped(term.rows, matrix.shape[0], term.input_rows)
            columns = damped(term.columns, matrix.shape[1], term.input_rows)
            total += float((rows @ matrix * (matrix @ columns)).sum())
    return total / 2 if metric == "loss" else total


def whitened(weight: Tensor, moments: Moments, metric: str) -> Tensor:
    """R^½ W K^½ by eigendecomposition: not the roots that the code under test takes."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.mT

    if not moments.terms:
        return weight
    (term,) = moments.terms.values()
    rows, columns = (
        damped(t, w, term.input_rows)
        for t, w in zip((term.rows, term.columns), weight.shape[-2:], strict=True)
    )
    return root(rows) @ weight @ root(columns) * (0.5**0.5 if metric == "loss" else 1.0)


def curve(
    weight: Tensor, moments: Moments, metric: str, formats: tuple[str, ...] | None = BOTH
) -> Spectrum:
    experts = weight.shape[0] if weight.dim() == 3 else 0
    where = site(*weight.shape[-2:], experts)
    return spectrum(where, weight, site_metrics(where, moments, metric), formats)


# ------------------------------------------------------------------------------------ shrinkage


def test_shrinkage_brings_a_moment_of_few_rows_closer_to_the_truth() -> None:
    """Rows from a known second moment: shrunk, the estimate is nearer to it, most where few."""
    width = 40
    truth = torch.logspace(0, -1, width, dtype=torch.float64).diag()
    root, mean = truth.sqrt(), float(truth.diagonal().mean())
    gains = []
    for samples in (20, 80, 20_000):
        rows = draw((samples, width), samples) @ root.T
        found = rows.T @ rows / samples
        share = shrinkage(found, samples)
        shrunk = (1 - share) * found + share * mean * torch.eye(width, dtype=torch.float64)
        gains.append(float((shrunk - truth).norm() / (found - truth).norm()))
    assert gains[0] < gains[1] < 1.0
    assert gains[2] == pytest.approx(1.0, abs=0.05)


def test_rows_without_directions_are_shrunk_to_their_mean() -> None:
    assert shrinkage(torch.eye(30, dtype=torch.float64), 500) == 1.0


def test_shrinkage_by_noise_brings_a_mean_of_few_matrices_closer_to_the_truth() -> None:
    """Samples of which each has a moment of its own, that many of its rows are alike in."""
    width, truth = 40, torch.logspace(0, -1, 40, dtype=torch.float64).diag()
    identity = torch.eye(width, dtype=torch.float64)
    gains = []
    for samples in (10, 40, 4000):
        rows = draw((samples, 1, width), samples) @ truth.sqrt()
        each = (rows + 0.1 * draw((samples, 5, width), samples + 1)).float().double()
        moments = each.mT @ each / 5
        found = moments.mean(0)
        spread = (moments - found).square().sum((1, 2)).mean() / samples
        share = shrinkage_of_noise(found, float(spread / found.square().sum()))
        mean = float(found.diagonal().mean())
        shrunk = (1 - share) * found + share * mean * identity
        of_rows = shrinkage(found, 5 * samples)  # as if all rows were independent: too little
        assert share > of_rows
        aim = truth + 0.01 * identity
        gains.append(float((shrunk - aim).norm() / (found - aim).norm()))
    assert gains[0] < gains[1] < 0.9
    assert gains[2] == pytest.approx(1.0, abs=0.1)


# ------------------------------------------------------------------------------ measured rises


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_more_distortion_never_costs_less_by_what_was_measured(
    pairs: list[tuple[float, float]],
) -> None:
    found = replace(
        curve(draw((6, 5)), Moments(), "frobenius"), measured=tuple(sorted(dict(pairs).items()))
    )
    distortions = np.logspace(-8, 4, 200)
    rises = found.rise(distortions)
    assert (np.diff(rises) >= -1e-12 * rises[1:]).all()
    assert float(found.rise(np.array(0.0))) == 0.0


def test_measured_rises_come_out_again_and_go_on_in_proportion() -> None:
    plain = curve(draw((6, 5)), Moments(), "frobenius")
    found = replace(plain, measured=((0.1, 0.2), (1.0, 5.0)))
    rises = found.rise(np.array([0.01, 0.1, 1.0, 2.0]))
    np.testing.assert_allclose(rises, [0.02, 0.2, 5.0, 10.0], rtol=1e-12)
    np.testing.assert_array_equal(plain.rise(np.array([0.3])), [0.3])


# The roots of a metric are kept in float32.
ROOTS = 64 * torch.finfo(torch.float32).eps


def matches(found: float, expected: float, whole: float) -> bool:
    return abs(found - expected) <= ROOTS * (expected + 1e-6 * whole)


# ------------------------------------------------------------------------------- what is lost


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_curve_says_what_the_factors_of_every_rank_lose(
    shape: tuple[int, int], metric: str, diagonal: bool
) -> None:
    weight, moments = draw(shape), moments_of(*shape, metric, diagonal=diagonal)
    found = curve(weight, moments, metric)
    assert found.distortion.shape == (min(shape) + 1,)
    assert found.distortion.dtype == torch.float64
    whole = lost(weight, moments, metric)
    for rank in range(min(shape) + 1):
        if rank == 0:
            delta = weight
        else:
            spec = TTSpec.low_rank(*shape, rank)
            delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert matches(float(found.distortion[rank]), lost(delta, moments, metric), whole), rank
        assert found.measured_error(weight, weight - delta) == pytest.approx(
            found.error(float(found.distortion[rank])), rel=1e-4, abs=1e-6
        )
    assert found.distortion[-1] == 0


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_factorization_of_a_rank_loses_less(
    shape: tuple[int, int], metric: str, diagonal: bool
) -> None:
    """Eckart and Young, for the whitened weight."""
    weight, moments = draw(shape), moments_of(*shape, metric, diagonal=diagonal)
    found = curve(weight, moments, metric).distortion
    squares = torch.linalg.svdvals(whitened(weight, moments, metric)).square()
    for rank in range(min(shape) + 1):
        assert matches(float(found[rank]), float(squares[rank:].sum()), float(squares.sum()))


@quick
@given(
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from(METRICS),
    st.integers(0, 99),
    st.floats(1e-3, 1.0),
)
def test_nearby_factors_lose_no_less(m: int, n: int, metric: str, seed: int, step: float) -> None:
    weight, moments = draw((m, n), seed), moments_of(m, n, metric, seed=seed)
    found = curve(weight, moments, metric)
    rank = 1 + seed % (min(m, n) - 1)
    left, right = found.factors(TTSpec.low_rank(m, n, rank), weight)
    other = (left + step * draw((m, rank), seed + 1)) @ (right + step * draw((rank, n), seed + 2))
    best = float(found.distortion[rank])
    assert lost(weight - other, moments, metric) >= best * (1 - ROOTS) - 1e-12


@quick
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(METRICS), st.integers(0, 99))
def test_the_curve_falls_from_the_whole_weight_to_nothing(
    m: int, n: int, metric: str, seed: int
) -> None:
    weight, moments = draw((m, n), seed), moments_of(m, n, metric, seed=seed)
    found = curve(weight, moments, metric).distortion
    assert matches(float(found[0]), lost(weight, moments, metric), 0.0)
    assert (found.diff() <= 0).all()
    assert found[-1] == 0


@quick
@given(st.floats(1e-3, 1e3), st.sampled_from(METRICS))
def test_the_curve_scales_with_the_square_of_the_weight(factor: float, metric: str) -> None:
    weight, moments = draw((6, 8)), moments_of(6, 8, metric)
    one, two = (curve(w, moments, metric).distortion for w in (weight, factor * weight))
    torch.testing.assert_close(two, one * factor**2, rtol=1e-9, atol=1e-9 * factor**2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_a_stack_of_experts_is_cut_at_one_rank(shape: tuple[int, int], metric: str) -> None:
    weight, moments = draw((3, *shape)), moments_of(*shape, metric)
    found = curve(weight, moments, metric)
    squares = torch.linalg.svdvals(whitened(weight, moments, metric)).square()
    for rank in range(min(shape) + 1):
        expected = float(squares[:, rank:].sum())
        assert matches(float(found.distortion[rank]), expected, float(squares.sum()))
        if rank:
            spec = TTSpec.low_rank(*shape, rank, experts=3)
            cores = found.factors(spec, weight)
            delta = weight - reconstruct(spec, cores)
            assert matches(lost(delta, moments, metric), expected, float(squares.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_lower_precision_loses_what_float64_does(dtype: torch.dtype, metric: str) -> None:
    weight, moments = draw((12, 9)).to(dtype), moments_of(12, 9, metric)
    found, exact = curve(weight, moments, metric), curve(weight.double(), moments, metric)
    cores = found.factors(TTSpec.low_rank(12, 9, 4), draw((12, 9)).to(dtype))
    assert {core.dtype for core in cores} == {torch.float32}
    torch.testing.assert_close(found.distortion, exact.distortion, rtol=1e-4, atol=1e-9)


# -------------------------------------------------------------------------------- tied weights


def tied_moments(m: int, n: int, diagonal: bool) -> Moments:
    """An embedding (M rows, looked up) that is also the head."""
    lookup = Term("lookup", moment(m, 3, diagonal=True), moment(n, 4, diagonal), 50)
    head = Term("columns", moment(m, 5, diagonal), moment(n, 6, diagonal) * 3, 70)
    return Moments({"lookup": lookup, "columns": head})


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
@pytest.mark.parametrize("shape", [(14, 6), (6, 14), (9, 9), (1, 6)])
def test_a_tied_weight_loses_the_sum_of_its_terms(shape: tuple[int, int], diagonal: bool) -> None:
    weight, moments = draw(shape), tied_moments(*shape, diagonal)
    found = curve(weight, moments, "loss")
    whole = lost(weight, moments, "loss")
    assert matches(float(found.distortion[0]), whole, whole)
    metric = average(found.metrics)
    for rank in range(1, paying(*shape) + 1):
        spec = TTSpec.low_rank(*shape, rank)
        left, right = best_factors(weight, metric, rank)
        delta = weight - left @ right
        assert matches(float(found.distortion[rank]), lost(delta, moments, "loss"), whole), rank
        delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert lost(delta, moments, "loss") <= float(found.distortion[rank]) * (1 + ROOTS)
    assert found.distortion[-1] == 0


def test_a_tied_weight_of_equal_terms_is_the_metric_of_one() -> None:
    weight = draw((9, 7))
    one = moments_of(9, 7, "loss")
    (term,) = one.terms.values()
    two = Moments({"a": term, "b": term})
    torch.testing.assert_close(
        curve(weight, two, "loss").distortion[:4],
        2 * curve(weight, one, "loss").distortion[:4],
        rtol=ROOTS,
        atol=0,
    )


def test_the_factors_of_a_tied_weight_beat_those_of_either_use_alone() -> None:
    weight, moments = draw((14, 6)), tied_moments(14, 6, diagonal=False)
    spec = TTSpec.low_rank(14, 6, 2)
    ours = float(curve(weight, moments, "loss").distortion[2])
    for name in moments.terms:
        alone = curve(weight, Moments({name: moments.terms[name]}), "loss")
        delta = weight - reconstruct(spec, alone.factors(spec, weight))
        assert ours < lost(delta, moments, "loss")


def test_how_a_term_is_split_between_its_two_sides_makes_no_difference() -> None:
    """Inputs a thousand times as large with gradients as much smaller: the same loss."""
    weight, moments = draw((14, 6)), tied_moments(14, 6, diagonal=False)
    head = moments.terms["columns"]
    assert head.rows is not None
    assert head.columns is not None
    other = Term("columns", head.rows * 1e-3, head.columns * 1e3, 70)
    one = curve(weight, moments, "loss")
    two = curve(weight, Moments({"lookup": moments.terms["lookup"], "columns": other}), "loss")
    torch.testing.assert_close(one.distortion, two.distortion, rtol=1e3 * ROOTS, atol=0)


def test_experts_used_in_two_ways_lose_the_sum() -> None:
    weight = draw((3, 8, 5))
    rows = Term("rows", moment(8, 3), moment(5, 4), 50)
    columns = Term("columns", moment(8, 5), moment(5, 6), 70)
    moments = Moments({"rows": rows, "columns": columns})
    found = curve(weight, moments, "loss")
    whole = lost(weight, moments, "loss")
    for rank in range(1, paying(8, 5) + 1):
        spec = TTSpec.low_rank(8, 5, rank, experts=3)
        delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert matches(float(found.distortion[rank]), lost(delta, moments, "loss"), whole)


# -------------------------------------------------------------------------------- exact ranks


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (1, 5), (3, 6, 4), (3, 4, 6)])
def test_exact_factors_are_exact(shape: tuple[int, ...]) -> None:
    for weight in (draw(shape), draw(shape) * 1e-20, draw(shape).bfloat16(), torch.zeros(shape)):
        left, right = exact_factors(weight)
        assert left.shape[-1] == right.shape[-2] == min(shape[-2:])
        error = (left @ right - weight.double()).abs().max()
        assert error <= 64 * torch.finfo(torch.float64).eps * weight.double().abs().max()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (3, 12, 9)])
def test_ranks_that_do_not_pay_are_there_too(shape: tuple[int, ...], metric: str) -> None:
    """Larger than the dense weight, but asked for by ``ranks=``: still the best of its rank."""
    weight, (m, n) = draw(shape), shape[-2:]
    moments = moments_of(m, n, metric)
    found = curve(weight, moments, metric)
    for rank in range(paying(m, n) + 1, min(m, n) + 1):
        spec = TTSpec.low_rank(m, n, rank, experts=shape[0] if len(shape) == 3 else 0)
        cores = found.factors(spec, weight)
        assert tuple(core.shape for core in cores) == spec.core_shapes
        delta = weight - reconstruct(spec, [core.double() for core in cores])
        expected = found.distortion_of(spec)
        assert matches(lost(delta, moments, metric), expected, float(found.distortion[0]))


# --------------------------------------------------------------------- difficult decompositions


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    u, v = torch.linalg.qr(draw((m, n), seed))[0], torch.linalg.qr(draw((n, n), seed + 1))[0]
    return u * values @ v.mT


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [1, 3, 6, 9, 12])
def test_truncated_errors_are_those_of_an_svd_to_four_digits(
    decades: int, dtype: torch.dtype, turned: bool
) -> None:
    """Spectra that fall geometrically, as far below a Gram matrix's precision as 1e-12."""
    m, n, pay = 48, 32, 19
    values = torch.logspace(0, -decades, n, dtype=torch.float64)
    weight = with_spectrum(m, n, values).to(dtype)
    weight = weight.mT.contiguous() if turned else weight
    vectors, squares = gram_eigenvectors(weight, pay)
    exact = torch.linalg.svdvals(weight.double()).square()
    assert torch.equal(squares, squares.sort(descending=True).values)
    for rank in range(pay + 1):
        tail = exact[rank:].sum()
        assert float(squares[rank:].sum()) == pytest.approx(float(tail), rel=1e-4)
        basis = vectors[:, :rank].double()
        w = weight.double()
        rest = w - (basis @ (basis.mT @ w) if turned else w @ basis @ basis.mT)
        # A projection in float64 has rounding of its own.
        floor = (64 * torch.finfo(torch.float64).eps) ** 2 * float(exact.sum())
        assert float(rest.square().sum()) == pytest.approx(float(tail), rel=1e-4, abs=floor)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("decades", [3, 9])
def test_curves_of_ill_conditioned_weights_are_right(decades: int, metric: str) -> None:
    weight = with_spectrum(48, 32, torch.logspace(0, -decades, 32, dtype=torch.float64))
    moments = moments_of(48, 32, metric)
    found = curve(weight, moments, metric)
    squares = torch.linalg.svdvals(whitened(weight, moments, metric)).square()
    for rank in range(paying(48, 32) + 1):
        expected = float(squares[rank:].sum())
        assert float(found.distortion[rank]) == pytest.approx(expected, rel=1e-4)
        spec = TTSpec.low_rank(48, 32, max(rank, 1))
        if rank:
            delta = weight - reconstruct(spec, found.factors(spec, weight))
            assert lost(delta, moments, metric) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_a_weight_of_lower_rank_loses_nothing_from_there_on(
    shape: tuple[int, int], dtype: torch.dtype, metric: str
) -> None:
    weight = (draw((shape[0], 5)) @ draw((5, shape[1]), 1)).to(dtype)
    moments = moments_of(*shape, metric)
    found = curve(weight, moments, metric)
    whole = float(found.distortion[0])
    floor = (64 * torch.finfo(dtype).eps) ** 2 * whole
    assert float(found.distortion[4]) > 1e-6 * whole
    assert float(found.distortion[5]) <= floor
    spec = TTSpec.low_rank(*shape, 5)
    rebuilt = reconstruct(spec, [core.double() for core in found.factors(spec, weight)])
    assert lost(weight.double() - rebuilt, moments, metric) <= 100 * floor
    full = found.factors(TTSpec.low_rank(*shape, paying(*shape)), weight)
    assert all(torch.isfinite(core).all() for core in full)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (3, 8, 6)])
def test_a_weight_of_zeros_loses_nothing(shape: tuple[int, ...], metric: str) -> None:
    weight, (m, n) = torch.zeros(shape), shape[-2:]
    found = curve(weight, moments_of(m, n, metric), metric)
    assert (found.distortion == 0).all()
    assert found.error(0.0) == 0.0
    assert found.measured_error(weight, weight.clone()) == 0.0
    spec = TTSpec.low_rank(m, n, 2, experts=shape[0] if len(shape) == 3 else 0)
    assert (reconstruct(spec, found.factors(spec, weight)) == 0).all()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_weights_whose_squares_leave_float32_are_done_in_float64(scale: float) -> None:
    weight = (draw((12, 9)) * scale).float()
    found = curve(weight, Moments(), "frobenius")
    squares = torch.linalg.svdvals(weight.double()).square()
    for rank in range(10):
        expected = float(squares[rank:].sum())
        assert float(found.distortion[rank]) == pytest.approx(expected, rel=1e-4)
    left, right = found.factors(TTSpec.low_rank(12, 9, 5), weight)
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("always", [False, True], ids=["in float32", "always"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigensolver_that_fails_is_not_the_end(
    dtype: torch.dtype, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw((12, 9))
    exact = torch.linalg.svdvals(weight).square()

    def failing(solver: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def fails(matrix: Tensor) -> Any:
            if matrix.dtype == torch.float32 or always:
                raise torch.linalg.LinAlgError("failed to converge")
            return solver(matrix)

        return fails

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, failing(getattr(torch.linalg, name)))
    _, squares = gram_eigenvectors(weight.to(dtype), 5)
    for found in (squares, singular_squares(weight.to(dtype), 5)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_moments_that_are_not_finite_are_an_error_that_names_the_site(
    bad: float, diagonal: bool
) -> None:
    moments = moments_of(8, 6, "loss", diagonal=diagonal)
    columns = moments.terms["columns"].columns
    assert columns is not None
    columns[0] = bad
    with pytest.raises(AnalysisError, match=r"^layer\.weight: .*second moment") as caught:
        curve(draw((8, 6)), moments, "loss")
    assert "calibration data" in str(caught.value)


def test_a_metric_of_zeros_is_no_reason_to_fail() -> None:
    """Inputs that are always zero: the weight does not matter."""
    moments = moments_of(8, 6, "loss")
    moments.terms["columns"].columns = torch.zeros(6, 6, dtype=torch.float64)
    weight = draw((8, 6))
    found = curve(weight, moments, "loss")
    assert torch.isfinite(found.distortion).all()
    left, right = found.factors(TTSpec.low_rank(8, 6, 3), weight)
    assert torch.isfinite(left @ right).all()
    assert float(found.distortion[0]) < 1e-12


# -------------------------------------------------------------------------------- tensor trains


def kronecker(terms: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """A 64 x 36 weight that is a sum of Kronecker products of 8 x 6 matrices, and noise."""
    parts = [
        torch.kron(draw((8, 6), seed + 2 * k), draw((8, 6), seed + 2 * k + 1)) for k in range(terms)
    ]
    weight = torch.stack(parts).sum(0)
    return weight + noise * weight.norm() / 48 * draw((64, 36), seed + 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("terms", [1, 3])
def test_kronecker_structure_is_found_without_being_asked_for(
    terms: int, noise: float, dtype: torch.dtype
) -> None:
    weight = kronecker(terms, noise).to(dtype)
    assert curve(weight, Moments(), "frobenius", BOTH).formats == BOTH  # a choice is binding
    found = curve(weight, Moments(), "frobenius", formats=None)
    assert found.formats == (*UNASKED, TT)
    spec, left = next((s, lost) for s, lost in found.train_points if s.ranks[0] >= terms)
    low = float(found.distortion[spec.parameters // (64 + 36)])
    assert left < 0.5 * low
    if not noise:
        assert left <= 1e3 * torch.finfo(dtype).eps ** 2 * float(found.distortion[0])


def test_no_structure_is_found_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 36), (36, 64), (64, 64), (96, 24), (30, 49), (37, 64), (53, 59)):
        m, n = shape
        gaussian = torch.randn(shape, generator=generator)
        low_rank = gaussian[:, :5] @ torch.randn(5, n, generator=generator)
        decaying = with_spectrum(
            max(shape), min(shape), torch.logspace(0, -2, min(shape)).double()
        ).float()
        decaying = decaying if m >= n else decaying.mT
        for name, weight in {
            "gaussian": gaussian,
            "low rank": low_rank,
            "low rank and noise": low_rank + 0.1 * gaussian,
            "decaying": decaying,
            "zero": torch.zeros(shape),
        }.items():
            found = curve(weight, Moments(), "frobenius", formats=None)
            assert found.formats == UNASKED, f"{name} {shape}"
            assert found.trains == ()
            assert found.train_points == ()


def test_the_probe_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    curve(kronecker(1), Moments(), "frobenius", formats=None)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("formats", [(DENSE, TT), (TT,), (DENSE, LOW_RANK, TT)])
@pytest.mark.parametrize("metric", METRICS)
def test_tensor_trains_asked_for_are_evaluated_in_the_metric(
    metric: str, formats: tuple[str, ...]
) -> None:
    weight, moments = draw((24, 36)), moments_of(24, 36, metric)
    found = curve(weight, moments, metric, formats)
    assert found.formats == formats
    assert {len(train.spec.cores) for train in found.trains} == {2, 3}
    assert found.train_points
    whole = lost(weight, moments, metric)
    for spec, left in found.train_points:
        assert spec.format == TT
        assert spec.parameters < 24 * 36
        delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert matches(left, lost(delta, moments, metric), whole)
        assert found.distortion_of(spec) == left


def test_a_train_between_the_points_is_evaluated_when_asked_for() -> None:
    weight, moments = draw((24, 36)), moments_of(24, 36, "loss")
    found = curve(weight, moments, "loss", (DENSE, TT))
    exact = found.trains[0].spec
    known = {spec.ranks for spec, _ in found.train_points}
    rank = next(r for r in range(1, 99) if (r,) not in known)
    spec = exact.with_ranks((rank,))
    delta = weight - reconstruct(spec, found.factors(spec, weight))
    whole = lost(weight, moments, "loss")
    assert matches(found.distortion_of(spec), lost(delta, moments, "loss"), whole)
    full = found.distortion_of(exact)
    assert full <= (1e3 * torch.finfo(torch.float64).eps) ** 2 * whole


def test_what_cannot_be_split_has_no_trains() -> None:
    prime = curve(draw((7, 11)), Moments(), "frobenius", (DENSE, TT))
    assert prime.train_points == ()
    experts = curve(draw((3, 8, 6)), Moments(), "frobenius", (DENSE, TT))
    assert experts.train_points == ()


def test_a_train_of_other_modes_is_an_error_with_a_way_out() -> None:
    found = curve(draw((24, 36)), Moments(), "frobenius", (DENSE, TT))
    with pytest.raises(AnalysisError, match=r"layer\.weight.*no tensor train with the modes"):
        found.distortion_of(TTSpec((2, 12), (6, 6), (3,)))


def test_formats_that_were_not_analysed_are_refused() -> None:
    found = curve(draw((8, 6)), Moments(), "frobenius")
    found.require((DENSE, LOW_RANK))
    with pytest.raises(AnalysisError, match="'tt' was not analysed") as caught:
        found.require((TT,))
    assert "formats=" in str(caught.value)


# -------------------------------------------------------------------------------- the formats


def test_formats_are_a_name_several_names_or_a_pattern_to_names() -> None:
    one = site(8, 6)
    two = Site("head.weight", (8, 6), "float32", (Use("linear", "columns"),))
    sites = [one, two]
    default = (*BOTH, "shared")
    assert formats_by_site(sites, None) == {"layer.weight": default, "head.weight": default}
    assert formats_by_site(sites, "tt") == {"layer.weight": (TT,), "head.weight": (TT,)}
    assert formats_by_site(sites, ["dense", "tt"])["head.weight"] == (DENSE, TT)
    chosen = formats_by_site(sites, {"head": "tt", "*": ("dense", "low_rank", "tt")})
    assert chosen == {"layer.weight": (DENSE, LOW_RANK, TT), "head.weight": (TT,)}
    assert formats_by_site(sites, {"head": "tt"})["layer.weight"] == default


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(AnalysisError, match="'butterfly' is no format") as caught:
        formats_by_site([site(8, 6)], ["dense", "butterfly"])
    assert "low_rank" in str(caught.value)
    with pytest.raises(AnalysisError, match="formats='nothing' matches no weight"):
        formats_by_site([site(8, 6)], {"nothing": "tt"})


def test_a_metric_is_the_norm_that_it_says() -> None:
    weight = draw((8, 6))
    left, right = draw((8, 8), 1).tril(), draw((6,), 2).abs()
    metric = Metric(0.5, left.float(), right.float())
    white = left.float().double().mT @ weight * right.float().double()
    assert metric.norm(weight) == pytest.approx(0.5 * float(white.square().sum()))
    torch.testing.assert_close(metric.whiten(weight), white)
    torch.testing.assert_close(metric.gram(weight), white.mT @ white)
