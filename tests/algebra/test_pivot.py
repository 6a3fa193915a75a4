"""Factors of low rank without the numbers that a change of basis can remove."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.algebra.pivot import (
    BOUND,
    columns,
    fitted,
    pivoted,
    pivoted_in_parts,
    plain,
    rounded,
)


def _factors(m: int, n: int, rank: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) in float64; the singular values of U V fall to 1 / condition."""
    draw = torch.Generator().manual_seed(seed)
    size = min(m, n)
    a, b = (
        torch.linalg.qr(torch.randn(k, size, generator=draw, dtype=torch.float64))[0]
        for k in (m, n)
    )
    sigma = torch.logspace(0, -torch.tensor(condition).log10().item(), rank, dtype=torch.float64)
    return a[:, :rank] * sigma.sqrt(), sigma.sqrt()[:, None] * b[:, :rank].T


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_product_is_the_same_with_fewer_numbers(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rank = data.draw(st.integers(1, min(m, n)))
    condition = 10.0 ** data.draw(st.integers(0, 8))
    left, right = _factors(m, n, rank, condition, data.draw(st.integers(0, 100)))
    found = pivoted(left, right)
    assert found.left.numel() + found.rest.numel() == rank * (m + n - rank)
    assert found.rest.numel() == 0 or found.rest.abs().max() <= BOUND * (1 + 1e-9)
    assert found.order.sort().values.tolist() == list(range(n))
    u, v = plain(found.left, found.rest, found.order)
    exact = left @ right
    assert (u @ v - exact).norm() <= 1e-12 * exact.norm()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_part_keeps_as_many_columns(data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from([2, 4]))
    n, rank = parts * data.draw(st.integers(2, 10)), parts * data.draw(st.integers(1, 2))
    m = data.draw(st.integers(rank, 40))
    left, right = _factors(m, n, rank, 10.0 ** data.draw(st.integers(0, 4)), 0)
    found = pivoted_in_parts(left, right, parts)
    assert found is not None
    kept, others = found.order.split([rank, n - rank])
    assert torch.bincount(kept // (n // parts)).tolist() == [rank // parts] * parts
    assert others.tolist() == sorted(others.tolist())
    same = kept[None] // (n // parts) == others[:, None] // (n // parts)
    assert bool((found.rest.mT[same].abs() <= BOUND * (1 + 1e-9)).all())
    u, v = plain(found.left, found.rest, found.order)
    assert (u @ v - left @ right).norm() <= 1e-10 * (left @ right).norm()


def test_a_part_of_zeros_keeps_no_columns() -> None:
    left, right = _factors(20, 16, 4, 10.0, 0)
    right[:, 8:] = 0
    assert pivoted_in_parts(left, right, 2) is None
    assert pivoted(left, right).rest.abs().max() <= BOUND * (1 + 1e-9)


def test_the_identity_stands_in_the_columns_that_come_first() -> None:
    found = pivoted(*_factors(6, 9, 4, 10.0, 0))
    _, v = plain(found.left, found.rest, found.order)
    assert torch.equal(v[:, found.order[:4].long()], torch.eye(4, dtype=torch.float64))
    first, others = found.order[:4].tolist(), found.order[4:].tolist()
    assert first == sorted(first)
    assert others == sorted(others)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_neighbours_stay_together_where_they_can(data: st.DataObject) -> None:
    neighbours = data.draw(st.sampled_from([2, 4]))
    m, n = data.draw(st.integers(1, 30)), neighbours * data.draw(st.integers(1, 10))
    rank = data.draw(st.integers(1, min(m, n)))
    condition = 10.0 ** data.draw(st.integers(0, 8))
    left, right = _factors(m, n, rank, condition, data.draw(st.integers(0, 100)))
    found = pivoted(left, right, neighbours=neighbours)
    assert len(found.order) in {n // width for width in (1, 2, 4)}
    assert columns(found.order, n).sort().values.tolist() == list(range(n))
    assert found.left.numel() + found.rest.numel() == rank * (m + n - rank)
    u, v = plain(found.left, found.rest, found.order)
    exact = left @ right
    assert (u @ v - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("neighbours", [2, 4])
@pytest.mark.parametrize(("m", "n", "rank"), [(96, 96, 47), (64, 256, 40), (256, 64, 61)])
def test_groups_cost_at_most_four_times_as_much_by_rounding(m, n, rank, neighbours) -> None:
    left, right = _factors(m, n, rank, 30.0, 0)
    exact, found = left @ right, pivoted(left, right, neighbours=neighbours)
    assert n // neighbours <= len(found.order) < n
    found = rounded(found, torch.bfloat16)
    u, v = plain(found.left.double(), found.rest.double(), found.order)
    before = (left.bfloat16().double() @ right.bfloat16().double() - exact).norm()
    assert (u @ v - exact).norm() <= 4 * before


def test_neighbours_that_are_alike_are_not_kept_together() -> None:
    left, right = _factors(20, 12, 6, 10.0, 0)
    twice = right.repeat_interleave(2, dim=1)
    found = pivoted(left, twice, neighbours=4)
    assert len(found.order) == 24
    u, v = plain(found.left, found.rest, found.order)
    assert torch.allclose(u @ v, left @ twice, atol=1e-12)


def test_components_of_other_scales_give_the_same() -> None:
    left, right = _factors(30, 40, 12, 1e3, 0)
    scale = 10 ** torch.linspace(-6, 6, 12, dtype=torch.float64)
    one, other = pivoted(left, right), pivoted(left / scale, scale[:, None] * right)
    assert torch.equal(one.order, other.order)
    assert torch.allclose(one.rest, other.rest, atol=1e-9)


def test_columns_that_are_zero_or_alike_are_no_obstacle() -> None:
    left, right = _factors(20, 12, 5, 10.0, 0)
    right[:, 3] = 0
    right[:, 7] = right[:, 2]
    found = pivoted(left, right)
    u, v = plain(found.left, found.rest, found.order)
    assert torch.allclose(u @ v, left @ right, atol=1e-12)
    assert 3 not in found.order[:5].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank"), [(96, 96, 48), (64, 256, 40), (256, 64, 60)])
def test_rounding_costs_at_most_four_times_that_of_plain_factors(m, n, rank, dtype) -> None:
    left, right = _factors(m, n, rank, 30.0, 0)
    exact = left @ right
    found = rounded(pivoted(left, right), dtype)
    assert (found.left.dtype, found.rest.dtype) == (dtype, dtype)
    u, v = plain(found.left.double(), found.rest.double(), found.order)
    before = (left.to(dtype).double() @ right.to(dtype).double() - exact).norm()
    assert (u @ v - exact).norm() <= 4 * before


def test_what_is_rounded_is_made_up_for() -> None:
    left, right = _factors(96, 96, 48, 30.0, 0)
    found, exact = pivoted(left, right), left @ right

    def off(u: Tensor, rest: Tensor) -> float:
        u, v = plain(u.double(), rest.double(), found.order)
        return float((u @ v - exact).norm())

    solved = rounded(found, torch.bfloat16)
    assert off(solved.left, solved.rest) < 0.75 * off(found.left.bfloat16(), found.rest.bfloat16())


def test_every_matrix_of_a_stack_has_columns_of_its_own() -> None:
    factors = [_factors(6, 9, 4, 10.0, seed) for seed in range(3)]
    found = [pivoted(*pair) for pair in factors]
    parts = ((one.left, one.rest, one.order) for one in found)
    u, v = plain(*(torch.stack(part) for part in zip(*parts, strict=True)))
    exact = torch.stack([left @ right for left, right in factors])
    assert (u @ v - exact).norm() <= 1e-12 * exact.norm()
    assert not torch.equal(found[0].order, found[1].order)
    for k, one in enumerate(found):
        assert torch.equal(v[k], plain(one.left, one.rest, one.order)[1])


def test_gradients_reach_both_factors() -> None:
    found = pivoted(*_factors(4, 6, 2, 3.0, 0))
    u, rest = found.left.requires_grad_(), found.rest.requires_grad_()

    def product(u: Tensor, rest: Tensor) -> Tensor:
        a, b = plain(u, rest, found.order)
        return a @ b

    assert torch.autograd.gradcheck(product, (u, rest))


def test_it_says_what_it_cannot_do() -> None:
    left, right = _factors(4, 6, 2, 3.0, 0)
    with pytest.raises(ValueError, match=r"above 1, got 1\.0"):
        pivoted(left, right, 1.0)
    with pytest.raises(ValueError, match="6 rows and only 2 columns"):
        pivoted(right.T @ left.T, right.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_fitted_to_another_ones_factor_is_a_part_of_their_stack(dtype: torch.dtype) -> None:
    """U' of several weights with one V: made at once, or of the first one's V' for each other."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator) for s in ((30, 12), (12, 20)))
    stack = rounded(pivoted(left, right), dtype)
    first = rounded(pivoted(left[:10], right), dtype)
    assert torch.equal(first.order, stack.order)
    if dtype == torch.float32:  # else it is rounded as those see it that are there
        assert torch.equal(first.rest, stack.rest)
    own = fitted(left[10:], right, first.rest, first.order)
    eps = torch.finfo(dtype).eps
    assert (own - stack.left[10:].double()).norm() < 8 * eps * own.norm()
    wanted = (left[10:].double() @ right.double())[:, first.order.long()]
    identity = torch.eye(12, dtype=torch.float64)
    second = torch.cat([identity, first.rest.double()], dim=1)
    least = torch.linalg.lstsq(second.mT, wanted.mT).solution.mT
    torch.testing.assert_close(own, least)
