"""Integers as bytes: back as they were, about as many bits as their entropy, and as predicted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorize.coding.symbols import PACKINGS, Histogram, cheapest, decoded, encoded

COUNT = 1 << 19
SPREADS = (0.3, 0.4, 0.6, 1.0, 2.0, 5.0, 20.0, 600.0)


def drawn(spread: float, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, generator=generator) * spread).round().to(torch.int32)


def entropy(codes: Tensor) -> float:
    shares = Histogram.of(codes).counts.double() / len(codes)
    return float(-torch.special.xlogy(shares, shares).sum()) / torch.log(torch.tensor(2.0)).item()


@pytest.mark.parametrize("each", PACKINGS)
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_integers_come_back(each: int, count: int) -> None:
    packing = PACKINGS[each]
    codes = (drawn(1.0, count) * packing.most).clamp(-packing.most, packing.most)
    parts = [memoryview(part) for part in encoded(codes, packing)]
    assert torch.equal(decoded(parts, packing, count).int(), codes)


@pytest.mark.parametrize("spread", SPREADS)
def test_sizes_are_near_the_entropy_and_as_histograms_say(spread: float) -> None:
    codes = drawn(spread)
    packing, predicted = cheapest(Histogram.of(codes), apart=48)
    kept = codes.masked_fill(codes.abs() > packing.most, 0)
    beside = 48 * int((codes.abs() > packing.most).sum())
    written = 8 * sum(map(len, encoded(kept, packing))) + beside
    assert written == pytest.approx(predicted, rel=0.02)
    assert written < (entropy(codes) * 1.04 + 0.02) * len(codes)


def test_nothing_but_zeros_takes_next_to_nothing() -> None:
    packing, _ = cheapest(Histogram.of(torch.zeros(COUNT, dtype=torch.int32)), apart=48)
    assert sum(map(len, encoded(torch.zeros(COUNT, dtype=torch.int32), packing))) < COUNT / 5000


def test_histograms_add_up() -> None:
    first, second = drawn(1.0, 500), drawn(40.0, 300)
    both = Histogram.of(first) + Histogram.of(second, beyond=2)
    whole = Histogram.of(torch.cat([first, second]))
    assert torch.equal(both.counts, whole.counts)
    assert both.total == 802
    inner, beyond = both.within(3)
    assert int(inner.sum()) + beyond == 802
