"""Low rank that stores no identity, at other ranks, and what an optimizer keeps of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tensorize import TTSpec
from tensorize.algebra.identities import lead, times, times_at
from tensorize.algebra.reconstruct import reconstruct
from tensorize.capture.matmul import Frame
from tensorize.formats.registry import format_of
from tensorize.training.bonds import bonds, with_ranks
from tensorize.training.changes import Change, change
from tensorize.weight.lazy import FactoredWeight
from tests.models import relative

SHAPES = ((30, 24, 8), (12, 40, 11), (40, 12, 9), (16, 16, 2), (7, 9, 7), (20, 6, 6))
SOME_KEPT = [shape for shape in SHAPES if shape[2] < min(shape[:2]) - 2]


def weight_of(m: int, n: int, rank: int, dtype: torch.dtype = torch.float64) -> FactoredWeight:
    torch.manual_seed(m + n + rank)
    plain = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    spec = TTSpec.low_rank(m, n, rank, pivoted=True)
    left, rest, order = format_of(spec).stored(spec, plain, dtype)
    return FactoredWeight(spec, (left, rest), Frame(), indices=(order,))


def changed(weight: FactoredWeight, rank: int) -> tuple[Change, FactoredWeight]:
    spec = weight.spec.with_ranks((rank,))
    found = bonds(weight.spec.plain, weight.plain_cores)
    how = change(weight, found, spec, torch.Generator().manual_seed(0))
    left, rest, order = how.cores
    return how, FactoredWeight(spec, (left, rest), Frame(), indices=(order,))


def stack_of(experts: int, m: int, n: int, rank: int) -> FactoredWeight:
    torch.manual_seed(0)
    plain = torch.randn(experts, m, rank).double(), torch.randn(experts, rank, n).double()
    spec = TTSpec.low_rank(m, n, rank, experts=experts, pivoted=True)
    left, rest, order = format_of(spec).stored(spec, plain, torch.float64)
    return FactoredWeight(spec, (left, rest), Frame(), indices=(order,))


def gradients(weight: FactoredWeight, of_dense: Tensor) -> list[Tensor]:
    """By the cores, where that by the dense weight is known."""
    cores = tuple(core.detach().requires_grad_() for core in weight.cores)
    return list(torch.autograd.grad(weight.with_cores(cores).dense(), cores, of_dense))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cut_is_the_best_approximation_and_stores_no_identity(shape: tuple[int, ...]) -> None:
    m, n, rank = shape
    weight = weight_of(m, n, rank)
    _, small = changed(weight, rank - 1)
    u, s, v = torch.linalg.svd(weight.dense(), full_matrices=False)
    best = (u * s)[:, : rank - 1] @ v[: rank - 1]
    torch.testing.assert_close(small.dense(), best)
    assert sum(core.numel() for core in small.cores) == (rank - 1) * (m + n - rank + 1)
    assert [tuple(core.shape) for core in small.cores] == list(small.spec.core_shapes)
    assert all(core.is_contiguous() for core in small.cores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SOME_KEPT, ids=str)
def test_growth_is_the_very_same_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    m, n, rank = shape
    weight = weight_of(m, n, rank, dtype)
    _, large = changed(weight, rank + 2)
    assert [tuple(core.shape) for core in large.cores] == list(large.spec.core_shapes)
    kept, others = large.indices[0].split([rank + 2, n - rank - 2])
    old = torch.isin(kept, weight.indices[0][:rank])
    stays = torch.isin(weight.indices[0][rank:], others)
    assert torch.equal(large.cores[0][:, old], weight.cores[0])
    assert torch.equal(large.cores[1][old], weight.cores[1][:, stays])
    assert not large.cores[1][~old].any()
    torch.testing.assert_close(large.dense(), weight.dense())
    of_dense = torch.randn(m, n, dtype=dtype)
    assert all(bool(g.all()) for g in gradients(large, of_dense))  # every entry can learn


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_momenta_are_those_of_the_same_gradient(shape: tuple[int, ...], lost: int) -> None:
    m, n, rank = shape
    weight = weight_of(m, n, rank)
    how, small = changed(weight, max(1, rank - 1 - lost))
    of_dense = torch.randn(m, n, dtype=torch.float64)
    moved = how.states(gradients(weight, of_dense), squared=False)
    for a, b in zip(moved, gradients(small, of_dense), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("shape", SOME_KEPT, ids=str)
def test_growth_keeps_what_is_known(shape: tuple[int, ...]) -> None:
    m, n, rank = shape
    weight = weight_of(m, n, rank)
    how, large = changed(weight, rank + 2)
    of_dense = torch.randn(m, n, dtype=torch.float64)
    before, wanted = gradients(weight, of_dense), gradients(large, of_dense)
    before_kept, kept = weight.indices[0][:rank], large.indices[0][: rank + 2]
    old = torch.isin(kept, before_kept)
    for squared in (False, True):
        values = [g.square() if squared else g for g in before]
        left, rest = how.states(values, squared=squared)
        assert torch.equal(left[:, old], values[0])
        exact = wanted[1].square() if squared else wanted[1]
        torch.testing.assert_close(rest[old], exact[old])
        for new, value in zip((left[:, ~old], rest[~old]), values, strict=True):
            start = value.mean() if squared else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(new, start.expand(new.shape))


@pytest.mark.parametrize("rank", [20, 30, 40])
def test_squares_keep_their_scale_through_a_cut(rank: int) -> None:
    """Of gradients whose rows and columns differ in size, as those of layers do."""
    m, n, before = 64, 48, 44
    weight = weight_of(m, n, before)
    how, small = changed(weight, rank)
    sizes = torch.rand(m, 1).add(0.3) * torch.rand(1, n).add(0.3)
    drawn = [(torch.randn(m, n) * sizes).double() for _ in range(50)]

    def squares(of: FactoredWeight) -> list[Tensor]:
        found = [gradients(of, each) for each in drawn]
        return [torch.stack([g[k] for g in found]).square().mean(0) for k in range(2)]

    moved = how.states(squares(weight), squared=True)
    for a, b in zip(moved, squares(small), strict=True):
        assert (a > 0).all()
        assert 0.4 < float(a.mean() / b.mean()) < 2.5
        assert (a / b).log().std().exp() < 3


def one_of(weight: FactoredWeight, k: int) -> FactoredWeight:
    cores = weight.cores[0][k], weight.cores[1][k]
    return FactoredWeight(weight.spec.single, cores, Frame(), indices=(weight.indices[0][k],))


@pytest.mark.parametrize("rank", [3, 8])
def test_each_expert_of_a_stack_changes_by_itself(rank: int) -> None:
    weight = stack_of(3, 12, 10, 5)
    how, other = changed(weight, rank)
    assert [tuple(core.shape) for core in other.cores] == list(other.spec.core_shapes)
    of_dense = torch.randn(3, 12, 10, dtype=torch.float64)
    before = [gradients(one_of(weight, k), of_dense[k]) for k in range(3)]
    kept = [torch.stack(parts) for parts in zip(*before, strict=True)]
    moved = how.states(kept, squared=False)
    for k in range(3):
        exact = one_of(weight, k).dense()
        if rank == 3:
            u, s, v = torch.linalg.svd(exact, full_matrices=False)
            exact = (u * s)[:, :3] @ v[:3]
            for a, b in zip(moved, gradients(one_of(other, k), of_dense[k]), strict=True):
                torch.testing.assert_close(a[k], b)
        torch.testing.assert_close(one_of(other, k).dense(), exact)


def test_a_cut_of_a_weight_of_which_all_columns_are_kept() -> None:
    how, small = changed(weight_of(9, 6, 6), 3)
    moved = how.states([torch.rand(9, 6).double(), torch.rand(6, 0).double()], squared=True)
    assert [value.shape for value in moved] == [core.shape for core in small.cores]
    assert all(bool((value > 0).all()) for value in moved)


def test_the_same_seed_grows_by_the_same_columns() -> None:
    weight = weight_of(*SHAPES[0])
    first, again = (changed(weight, 12)[0].cores for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert relative(changed(weight, 12)[1].dense(), weight.dense()) < 1e-12


# ------------------------------------------------------------------------------ trains and blocks

BONDS = (
    TTSpec((5, 6), (4, 6), (9,)),
    TTSpec((3, 2, 5), (2, 4, 3), (5, 6)),
    TTSpec((2, 3, 2, 2), (2, 2, 3, 2), (3, 6, 3)),
    TTSpec.block((6, 5), (3, 8), 4),
)


def random_cores(spec: TTSpec) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes]


def held(spec: TTSpec, stored: Sequence[Tensor]) -> FactoredWeight:
    count = len(spec.core_shapes)
    return FactoredWeight(spec, tuple(stored[:count]), Frame(), indices=tuple(stored[count:]))


def without_identities(spec: TTSpec, cores: Sequence[Tensor]) -> FactoredWeight:
    bare = spec.in_order_of(1)
    return held(bare, format_of(spec).stored(bare, cores, torch.float64))


def of_other_ranks(weight: FactoredWeight, spec: TTSpec) -> tuple[Change, FactoredWeight]:
    found = bonds(weight.spec.plain, weight.plain_cores)
    how = change(weight, found, spec, torch.Generator().manual_seed(0))
    return how, held(spec, how.cores)


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("spec", BONDS, ids=str)
def test_what_is_not_needed_is_cut_and_momenta_are_those_of_the_same_gradient(
    spec: TTSpec, by: int
) -> None:
    """A weight at ranks that are larger than its own: all of its cuts are exact."""
    ranks = [rank - by for rank in spec.ranks]
    cores = random_cores(spec.with_ranks(ranks))
    for k, (small, large) in enumerate(zip(ranks, spec.ranks, strict=True), 1):
        shared = lead(spec, k)
        basis = torch.randn(*(spec.size[axis] for axis in shared), small, large).double()
        back = torch.linalg.pinv(basis)
        cores[k - 1] = times(spec, k, cores[k - 1], basis)
        cores[k] = times_at(cores[k], spec.cores[k], f"r{k}", shared, back.mT)
    weight = without_identities(spec, cores)
    how, small = of_other_ranks(weight, weight.spec.with_ranks(ranks))
    assert [tuple(core.shape) for core in small.cores] == list(small.spec.core_shapes)
    torch.testing.assert_close(small.dense(), weight.dense())
    of_dense = torch.randn(spec.shape, dtype=torch.float64)
    moved = how.states(gradients(weight, of_dense), squared=False)
    for a, b in zip(moved, gradients(small, of_dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.is_contiguous()


@pytest.mark.parametrize("spec", BONDS, ids=str)
def test_trains_and_blocks_are_cut_and_grow_as_those_that_store_all(spec: TTSpec) -> None:
    weight = without_identities(spec, random_cores(spec))
    for by in (-2, 1):
        other = spec.in_order_of(1).with_ranks([rank + by for rank in spec.ranks])
        how, now = of_other_ranks(weight, other)
        cores = [core.detach() for core in weight.plain_cores]
        plain = with_ranks(spec, cores, bonds(spec, cores), other.ranks)
        torch.testing.assert_close(now.dense(), reconstruct(other.plain, plain))
        kept = how.states([core.square() for core in weight.cores], squared=True)
        assert [value.shape for value in kept] == [core.shape for core in now.cores]


@pytest.mark.parametrize("spec", BONDS, ids=str)
def test_squares_of_trains_and_blocks_keep_their_scale(spec: TTSpec) -> None:
    weight = without_identities(spec, random_cores(spec))
    how, small = of_other_ranks(weight, weight.spec.with_ranks([r - 1 for r in spec.ranks]))
    drawn = [torch.randn(spec.shape, dtype=torch.float64) for _ in range(40)]

    def squares(of: FactoredWeight) -> list[Tensor]:
        found = [gradients(of, each) for each in drawn]
        return [torch.stack(g).square().mean(0) for g in zip(*found, strict=True)]

    for a, b in zip(how.states(squares(weight), squared=True), squares(small), strict=True):
        assert (a > 0).all()
        assert 0.3 < float(a.mean() / b.mean()) < 3
