"""Rate-distortion curves: what every rank loses, and that nothing loses less.

Shapes: M rows and N columns of the weight W, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorize.algebra.factors import best_factors, exact_factors
from tensorize.algebra.metric import average
from tensorize.algebra.reconstruct import reconstruct
from tensorize.ir.spec import TTSpec
from tensorize.passes.observe.moments import Moments
from tests.passes.curves.losses import (
    METRICS,
    ROOTS,
    curve,
    draw,
    lost,
    matches,
    moment,
    moments_of,
    paying,
    term,
    whitened,
)

quick = settings(max_examples=30, deadline=None, derandomize=True)

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9), "one row": (1, 6), "column": (6, 1)}


# ----------------------------------------------------------------------------------- measured rises


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


# ------------------------------------------------------------------------------------- what is lost


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


# ------------------------------------------------------------------------------------- tied weights


def tied_moments(m: int, n: int, diagonal: bool) -> Moments:
    """An embedding (M rows, looked up) that is also the head."""
    lookup = term("lookup", moment(m, 3, diagonal=True), moment(n, 4, diagonal), 50)
    head = term("columns", moment(m, 5, diagonal), moment(n, 6, diagonal) * 3, 70)
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
    (single,) = one.terms.values()
    two = Moments({"a": single, "b": single})
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
    other = term("columns", head.rows * 1e-3, head.columns * 1e3, 70)
    one = curve(weight, moments, "loss")
    two = curve(weight, Moments({"lookup": moments.terms["lookup"], "columns": other}), "loss")
    torch.testing.assert_close(one.distortion, two.distortion, rtol=1e3 * ROOTS, atol=0)


def test_experts_used_in_two_ways_lose_the_sum() -> None:
    weight = draw((3, 8, 5))
    rows = term("rows", moment(8, 3), moment(5, 4), 50)
    columns = term("columns", moment(8, 5), moment(5, 6), 70)
    moments = Moments({"rows": rows, "columns": columns})
    found = curve(weight, moments, "loss")
    whole = lost(weight, moments, "loss")
    for rank in range(1, paying(8, 5) + 1):
        spec = TTSpec.low_rank(8, 5, rank, experts=3)
        delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert matches(float(found.distortion[rank]), lost(delta, moments, "loss"), whole)


# -------------------------------------------------------------------------------------- exact ranks


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
