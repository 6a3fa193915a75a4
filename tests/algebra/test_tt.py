"""Tensor-train algebra: what decomposing, reconstructing and rounding promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.algebra.decompose import tt_svd
from tensorize.algebra.modes import balanced_modes, max_ranks
from tensorize.algebra.reconstruct import reconstruct
from tensorize.algebra.rounding import round_tt
from tensorize.algebra.svd import svd
from tensorize.base.errors import AnalysisError
from tensorize.ir.spec import TTSpec
from tests.algebra.unfoldings import discarded, unfolding_spectra

quick = settings(max_examples=40, deadline=None, derandomize=True)


def draw_matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in spec.core_shapes]


def rounding(spec: TTSpec, dtype: torch.dtype = torch.float64) -> float:
    """Relative rounding of d orthogonal transformations of a matrix of this size, with constant."""
    return 8 * len(spec.cores) * sum(spec.shape) * torch.finfo(dtype).eps


def relative(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm()).item()


modes = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 4), min_size=count, max_size=count).map(tuple),
        st.lists(st.integers(1, 4), min_size=count, max_size=count).map(tuple),
    )
)


@st.composite
def specs(draw: st.DrawFn, experts: int = 0) -> TTSpec:
    rows, columns = draw(modes)
    ranks = draw(
        st.lists(st.integers(1, 4), min_size=len(rows) - 1, max_size=len(rows) - 1).map(tuple)
    )
    return TTSpec(rows, columns, ranks, experts=draw(st.integers(0, experts)))


# ------------------------------------------------------------------------------ reconstruction


@quick
@given(specs(experts=3), st.integers(0, 9))
def test_reconstruct_is_the_sum_over_all_ranks(spec: TTSpec, seed: int) -> None:
    """Against one einsum over all indices at once."""
    cores = draw_cores(spec, seed)
    letters = {name: chr(ord("a") + k) for k, (name, _) in enumerate(spec.sizes)}
    inputs = ",".join("".join(letters[name] for name in core) for core in spec.cores)
    output = "".join(letters[name] for name in (*spec.batch, *spec.rows, *spec.columns))
    expected = torch.einsum(f"{inputs}->{output}", *cores).reshape(spec.shape)
    weight = reconstruct(spec, cores)
    assert weight.shape == spec.shape
    scale = reconstruct(spec, [core.abs() for core in cores])
    assert ((weight - expected).abs() <= rounding(spec) * scale).all()


def test_low_rank_is_the_plain_product() -> None:
    spec = TTSpec.low_rank(5, 7, 3)
    u, v = draw_cores(spec)
    assert torch.equal(reconstruct(spec, [u, v]), u @ v)


def test_experts_are_reconstructed_one_by_one() -> None:
    spec = TTSpec((2, 3), (4, 2), (3,), experts=4)
    cores = draw_cores(spec)
    weight = reconstruct(spec, cores)
    one = TTSpec((2, 3), (4, 2), (3,))
    each = torch.stack([reconstruct(one, [core[e] for core in cores]) for e in range(4)])
    torch.testing.assert_close(weight, each, rtol=rounding(spec), atol=0)


def test_reconstruct_keeps_the_dtype_and_the_gradient() -> None:
    spec = TTSpec((2, 3), (3, 2), (2,))
    assert reconstruct(spec, draw_cores(spec, dtype=torch.bfloat16)).dtype == torch.bfloat16
    cores = [core.requires_grad_() for core in draw_cores(spec)]
    assert torch.autograd.gradcheck(lambda *c: reconstruct(spec, c), cores)


def test_reconstruct_refuses_cores_of_another_spec() -> None:
    spec = TTSpec.low_rank(5, 7, 3)
    with pytest.raises(ValueError, match=r"cores of shapes \(\(5, 3\), \(3, 7\)\)"):
        reconstruct(spec, draw_cores(TTSpec.low_rank(5, 7, 2)))


# --------------------------------------------------------------------------------------- tt_svd


@quick
@given(modes, st.integers(0, 9))
def test_full_ranks_give_the_matrix_back(modes: tuple, seed: int) -> None:
    rows, columns = modes
    matrix = draw_matrix(math.prod(rows), math.prod(columns), seed)
    spec, cores = tt_svd(matrix, rows, columns)
    assert tuple(core.shape for core in cores) == spec.core_shapes
    assert spec.ranks == max_ranks(rows, columns)
    assert relative(reconstruct(spec, cores) - matrix, matrix) <= rounding(spec)


@quick
@given(specs(), st.integers(0, 9))
def test_the_error_lies_between_its_bounds(wanted: TTSpec, seed: int) -> None:
    rows, columns = wanted.row_modes, wanted.column_modes
    matrix = draw_matrix(*wanted.shape, seed)
    spec, cores = tt_svd(matrix, rows, columns, wanted.ranks)
    assert all(a <= b for a, b in zip(spec.ranks, wanted.ranks, strict=True))
    lost = discarded(unfolding_spectra(matrix, rows, columns), spec.ranks)
    error = (reconstruct(spec, cores) - matrix).norm().item()
    slack = rounding(spec) * matrix.norm().item()
    assert lost.max() - slack <= error <= lost.norm() + slack


def test_two_cores_without_shared_modes_are_the_truncated_svd() -> None:
    matrix = draw_matrix(12, 9)
    spec, (u, v) = tt_svd(matrix, (12, 1), (1, 9), 4)
    assert spec == TTSpec.low_rank(12, 9, 4)
    best = torch.linalg.svdvals(matrix)[4:].norm()
    torch.testing.assert_close((u @ v - matrix).norm(), best, rtol=rounding(spec), atol=0)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_sum_of_kronecker_products_is_exact_at_that_rank(terms: int) -> None:
    matrix = sum(
        (
            torch.kron(draw_matrix(3, 4, seed), draw_matrix(4, 2, seed + 10))
            for seed in range(terms)
        ),
        start=torch.zeros(12, 8, dtype=torch.float64),
    )
    spec, cores = tt_svd(matrix, (3, 4), (4, 2), terms)
    assert relative(reconstruct(spec, cores) - matrix, matrix) <= rounding(spec)


def test_a_product_of_three_kronecker_factors_has_unit_ranks() -> None:
    matrix = torch.kron(
        torch.kron(draw_matrix(2, 3, 0), draw_matrix(3, 2, 1)), draw_matrix(4, 2, 2)
    )
    spec, cores = tt_svd(matrix, (2, 3, 4), (3, 2, 2), 1)
    assert relative(reconstruct(spec, cores) - matrix, matrix) <= rounding(spec)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((1,), (7,)), ((1, 1), (1, 6)), ((1, 1, 1), (2, 1, 3)), ((4, 1), (1, 1)), ((1, 1), (1, 1))],
)
def test_vectors_and_unit_modes_are_matrices_too(rows: tuple, columns: tuple) -> None:
    matrix = draw_matrix(math.prod(rows), math.prod(columns))
    spec, cores = tt_svd(matrix, rows, columns)
    assert spec.shape == tuple(matrix.shape)
    weight = reconstruct(spec, cores)
    assert relative(weight - matrix, matrix) <= rounding(spec)


def test_one_core_is_a_copy() -> None:
    matrix = draw_matrix(3, 4)
    spec, (core,) = tt_svd(matrix, (3,), (4,))
    assert spec.ranks == ()
    assert torch.equal(core, matrix)
    assert core.data_ptr() != matrix.data_ptr()


def test_all_cores_but_the_last_are_orthogonal() -> None:
    matrix = draw_matrix(24, 24)
    spec, cores = tt_svd(matrix, (2, 3, 4), (4, 3, 2), (3, 5))
    for core, rank in zip(cores, spec.ranks, strict=False):
        flat = core.reshape(-1, rank)
        torch.testing.assert_close(
            flat.mT @ flat, torch.eye(rank, dtype=torch.float64), rtol=0, atol=rounding(spec)
        )


def test_ranks_are_clipped() -> None:
    spec, _ = tt_svd(draw_matrix(8, 8), (2, 2, 2), (2, 2, 2), 1000)
    assert spec.ranks == (4, 4)


def test_a_zero_matrix_is_one_of_any_rank() -> None:
    spec, cores = tt_svd(torch.zeros(8, 8), (2, 2, 2), (2, 2, 2), 1)
    assert torch.equal(reconstruct(spec, cores), torch.zeros(8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cores_come_in_the_dtype_of_the_matrix(dtype: torch.dtype) -> None:
    matrix = draw_matrix(6, 8, dtype=torch.float32).to(dtype).requires_grad_()
    spec, cores = tt_svd(matrix, (2, 3), (4, 2))
    assert {core.dtype for core in cores} == {dtype}
    assert not any(core.requires_grad for core in cores)
    weight = reconstruct(spec, [core.double() for core in cores])
    # Each core is rounded once to the dtype.
    error = relative(weight - matrix.double(), matrix.double())
    assert error <= len(cores) * torch.finfo(dtype).eps + rounding(spec, torch.float32)


def test_what_cannot_be_decomposed_is_refused() -> None:
    matrix = draw_matrix(6, 8)
    with pytest.raises(ValueError, match="one by one"):
        tt_svd(matrix.reshape(2, 3, 8), (3, 1), (1, 8))
    with pytest.raises(ValueError, match=r"make a matrix of \(6, 4\)"):
        tt_svd(matrix, (2, 3), (2, 2))
    with pytest.raises(ValueError, match="1 inner ranks"):
        tt_svd(matrix, (2, 3), (4, 2), (2, 2))
    with pytest.raises(AnalysisError, match="NaN"):
        tt_svd(matrix / 0, (2, 3), (4, 2))


# -------------------------------------------------------------------------- the svd that gets by


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)])
def test_where_lapack_fails_the_gram_matrix_does_it(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = draw_matrix(*shape) @ torch.diag(torch.logspace(0, -3, shape[1]).double())
    expected = torch.linalg.svdvals(matrix)

    def fails(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    u, s, vh = svd(matrix)
    # Squaring the matrix leaves the square root of the precision.
    accuracy = sum(shape) * math.sqrt(torch.finfo(torch.float64).eps)
    assert relative(u @ torch.diag(s) @ vh - matrix, matrix) <= accuracy
    torch.testing.assert_close(s, expected, rtol=0, atol=accuracy * expected[0].item())
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, identity)
    torch.testing.assert_close(vh @ vh.mT, identity)


def test_the_gram_matrix_does_a_singular_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    for matrix in (torch.zeros(4, 3), torch.ones(4, 3), 1e-30 * torch.ones(3, 4)):
        u, s, vh = svd(matrix)
        torch.testing.assert_close(u @ torch.diag(s) @ vh, matrix)
        torch.testing.assert_close(u.mT @ u, torch.eye(3))


# ------------------------------------------------------------------------------------- rounding


@quick
@given(specs(), st.integers(0, 9))
def test_rounding_without_a_target_changes_only_the_gauge(spec: TTSpec, seed: int) -> None:
    cores = draw_cores(spec, seed)
    weight = reconstruct(spec, cores)
    rounded, new = round_tt(spec, cores)
    assert all(a <= b for a, b in zip(rounded.ranks, spec.ranks, strict=True))
    assert tuple(core.shape for core in new) == rounded.core_shapes
    assert relative(reconstruct(rounded, new) - weight, weight) <= rounding(spec)


@quick
@given(specs(), st.integers(1, 3), st.integers(0, 9))
def test_rounding_obeys_the_bounds_of_tt_svd(spec: TTSpec, rank: int, seed: int) -> None:
    cores = draw_cores(spec, seed)
    weight = reconstruct(spec, cores)
    rounded, new = round_tt(spec, cores, rank)
    spectra = unfolding_spectra(weight, spec.row_modes, spec.column_modes)
    lost = discarded(spectra, rounded.ranks)
    error = (reconstruct(rounded, new) - weight).norm().item()
    slack = rounding(spec) * weight.norm().item()
    assert max(rounded.ranks, default=1) <= rank
    assert lost.max() - slack <= error <= lost.norm() + slack


def test_rounding_loses_nothing_with_ranks_that_hold_nothing() -> None:
    matrix = torch.kron(draw_matrix(3, 4), draw_matrix(4, 2, 1))
    spec, cores = tt_svd(matrix, (3, 4), (4, 2), 5)
    assert spec.ranks == (5,)
    rounded, new = round_tt(spec, cores, 1)
    assert relative(reconstruct(rounded, new) - matrix, matrix) <= 1e-10 + rounding(spec)


def test_rounding_refuses_experts() -> None:
    spec = TTSpec.low_rank(3, 4, 2, experts=2)
    with pytest.raises(ValueError, match="one by one"):
        round_tt(spec, draw_cores(spec))


# -------------------------------------------------------------------------------------- modes


def test_max_ranks_is_the_smaller_side_of_each_unfolding() -> None:
    assert max_ranks((2, 3, 4), (5, 1, 2)) == (10, 8)
    assert max_ranks((7, 1), (1, 3)) == (3,)
    assert max_ranks((7,), (3,)) == ()


@pytest.mark.parametrize(
    ("size", "count", "modes"),
    [
        (4096, 1, (4096,)),
        (4096, 2, (64, 64)),
        (4096, 3, (16, 16, 16)),
        (12, 2, (4, 3)),
        (36, 3, (4, 3, 3)),
        (768, 2, (32, 24)),
        (3072, 3, (16, 16, 12)),
        (11008, 3, (43, 16, 16)),
        (50257, 2, (1733, 29)),
        (13, 3, (13, 1, 1)),
        (1, 2, (1, 1)),
    ],
)
def test_balanced_modes_by_example(size: int, count: int, modes: tuple[int, ...]) -> None:
    assert balanced_modes(size, count) == modes


@quick
@given(st.integers(1, 600), st.integers(1, 4))
def test_balanced_modes_have_the_smallest_sum(size: int, count: int) -> None:
    def splits(rest: int, left: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(rest,)]
        factors = [k for k in range(1, rest + 1) if rest % k == 0]
        return [(k, *tail) for k in factors for tail in splits(rest // k, left - 1)]

    modes = balanced_modes(size, count)
    assert math.prod(modes) == size
    assert list(modes) == sorted(modes, reverse=True)
    candidates = {tuple(sorted(split, reverse=True)) for split in splits(size, count)}
    assert modes == min(candidates, key=lambda split: (sum(split), split))


def test_balanced_modes_of_large_composite_sizes_are_quick() -> None:
    assert math.prod(balanced_modes(720720, 6)) == 720720
    assert balanced_modes(2**24, 6) == (16,) * 6
