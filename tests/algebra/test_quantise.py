"""Codes of a few bits: what they lose in a metric, and what is said of it beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorize.algebra import packing
from tensorize.algebra.metric import Metric
from tensorize.algebra.quantise import codes_for, expected, grid, pivots
from tensorize.ir.precision import INTEGERS, Precision

KINDS = pytest.mark.parametrize("kind", INTEGERS.values(), ids=INTEGERS)
PLAIN = Metric(1.0, None, None)


def root(size: int, decay: float = 1.0) -> Tensor:
    """The Cholesky factor of a moment whose eigenvalues fall."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    moment = (basis * torch.arange(1, size + 1) ** -decay) @ basis.T
    return torch.linalg.cholesky(moment).float()


def metric(m: int, n: int) -> Metric:
    return Metric(0.5, root(m), root(n))


def lost(weight: Tensor, kind: Precision, given: Metric, judged: Metric | None = None) -> float:
    """What codes chosen in one metric lose in another, or in the same."""
    found = grid(weight, kind, given)
    return (judged or given).norm(found.values(codes_for(weight, found, given)) - weight)


@KINDS
@pytest.mark.parametrize("columns", [1, 3, 64, 100, 130])
def test_packed_codes_come_back_and_take_their_bits(kind: Precision, columns: int) -> None:
    low, high = kind.codes
    dtype = getattr(torch, kind.dtype)
    codes = torch.randint(low, high + 1, (2, 5, columns), dtype=dtype)
    held = packing.packed(codes, kind.bits)
    assert held.shape == (2, 5, kind.packed(columns))
    assert kind.packed(columns) <= columns * kind.bits / 8 + 2
    assert torch.equal(packing.unpacked(held, kind.bits, columns), codes)


@KINDS
def test_every_entry_is_within_half_a_step_of_its_own(kind: Precision) -> None:
    weight = torch.randn(20, 150)
    found = grid(weight, kind, PLAIN)
    off = (found.values(found.nearest(weight)) - weight).abs()
    cut = found.nearest(weight).to(torch.int16)
    inside = (cut > kind.codes[0]) & (cut < kind.codes[1])
    assert (off <= 0.5001 * found.steps)[inside].all()
    assert inside.float().mean() > 0.4


@KINDS
def test_a_row_of_zeros_stays_one(kind: Precision) -> None:
    weight = torch.randn(4, 128)
    weight[2] = 0
    found = grid(weight, kind, PLAIN, torch.bfloat16)
    assert not found.values(codes_for(weight, found, Metric(1.0, None, root(128))))[2].any()


@KINDS
def test_scales_are_what_is_kept_before_codes_are_chosen(kind: Precision) -> None:
    weight = torch.randn(30, 200)
    found = grid(weight, kind, PLAIN, torch.bfloat16)
    assert torch.equal(found.scale, found.scale.bfloat16().float())


@KINDS
def test_each_side_of_the_metric_that_takes_up_errors_lowers_what_is_lost(kind: Precision) -> None:
    torch.manual_seed(1)
    weight, both = torch.randn(96, 160), metric(96, 160)
    nearest = lost(weight, kind, PLAIN, both)
    inputs = lost(weight, kind, Metric(0.5, None, both.right), both)
    assert inputs < 0.8 * nearest
    assert lost(weight, kind, both) < inputs


@KINDS
@pytest.mark.parametrize("shape", [(70, 90), (33, 129), (2, 64)])
def test_what_is_lost_is_known_without_rounding(kind: Precision, shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    weight, given = torch.randn(shape), metric(*shape)
    said = expected(grid(weight, kind, given).steps, given.scale, *pivots(given, weight))
    # Damping lowers what is pushed into small directions, and raises what is said of them.
    assert 0.4 * said < lost(weight, kind, given) < 1.6 * said


def test_the_same_is_found_entry_by_entry() -> None:
    """The wave of entries does what its definition says, in the order of its definition."""
    torch.manual_seed(3)
    weight, given, kind = torch.randn(37, 41), metric(37, 41), INTEGERS["int4"]
    found = grid(weight, kind, given)
    codes = codes_for(weight, found, given)

    def unit(side: Tensor | None) -> Tensor:
        assert side is not None
        moment = side @ side.T
        moment.diagonal().add_(0.1 * moment.diagonal().mean())
        lower = torch.linalg.cholesky(moment)
        return lower / lower.diagonal()

    a, b = unit(given.right), unit(given.left)
    change = torch.zeros_like(weight)
    steps = found.steps
    zeros = found.zero.repeat_interleave(64, 1)[:, :41]
    for j in reversed(range(41)):
        for i in reversed(range(37)):
            pulled = float((b.T @ change @ a)[i, j])
            code = torch.round((weight[i, j] - pulled) / steps[i, j] + zeros[i, j]).clamp(0, 15)
            change[i, j] = (code - zeros[i, j]) * steps[i, j] - weight[i, j]
    other = found.values(codes) - weight
    assert (other != change).float().mean() < 0.02  # of ties, in another order of sums
    assert given.norm(other) == pytest.approx(given.norm(change), rel=0.02)
