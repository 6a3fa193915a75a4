"""Entries as multiples of a step, those apart that are none.

What cannot be told so (NaN, infinity, an entry whose error would pass the bound) is kept beside,
bit for bit. Products of a code and a step are rounded once, so every machine decodes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.coding import planes, symbols
from tensorize.coding.symbols import PACKINGS, WIDE, Histogram, cheapest

_STRICT = 1 - 2**-40
"""Of a bound: differences are rounded to float64 before they are compared."""

_PLACE_BITS = 16
"""Of the place of an entry that is kept beside, about."""

_FLOAT32_STEPS = 1e-30, 1e30


@dataclass(frozen=True)
class Stepped:
    """Codes (N,), 0 where an entry is kept beside, which ``beside`` says."""

    codes: Tensor
    beside: Tensor
    step: float


def stepped(entries: Tensor, bound: float, step: float) -> Stepped:
    """Multiples of a step that are within a bound of the entries (N,), or as they are."""
    codes = (entries.double() / step).round_().nan_to_num_(WIDE.most + 1)
    far = codes.abs() > WIDE.most
    codes = codes.masked_fill_(far, 0).to(torch.int32)
    lost = (numbers(codes, step, entries.dtype).double() - entries.double()).abs_()
    beside = far | ~(lost <= bound * _STRICT)
    return Stepped(codes.masked_fill_(beside, 0), beside, step)


def numbers(codes: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """What codes (N,) stand for."""
    low, high = _FLOAT32_STEPS
    usual = dtype.itemsize < 8 and low < step < high
    found = codes.to(torch.float32 if usual else torch.float64).mul_(step)
    return found.to(dtype)


# ------------------------------------------------------------------------------------------ bytes


def size_of(found: Histogram, itemsize: int) -> tuple[symbols.Packing, float]:
    """How codes are packed best, and the bits that they are expected to take."""
    return cheapest(found, _PLACE_BITS + 8 * itemsize)


def histogram(found: Stepped) -> Histogram:
    kept = Histogram.of(found.codes)
    beside = int(found.beside.sum())
    kept.counts[kept.most] -= beside
    return Histogram(kept.counts, beside)


def encoded(found: Stepped, entries: Tensor, packing: symbols.Packing) -> list[bytes]:
    """The parts of a block: codes, and places and entries of what is kept beside."""
    beside = found.beside | (found.codes.abs() > packing.most)
    codes = found.codes.masked_fill(beside, 0)
    parts = symbols.encoded(codes, packing)
    places = beside.nonzero().flatten()
    if len(places):
        gaps = places.diff(prepend=places.new_zeros(1)).to(torch.int32)
        parts += [*planes.encoded(gaps), *planes.encoded(entries[places])]
    return parts


def decoded(
    parts: Sequence[memoryview], packing: int, count: int, beside: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N,), places and entries of what is kept beside.

    Raises:
        ValueError: they are damaged.
    """
    known = PACKINGS[packing]
    split = 2 if known == WIDE else 1
    if len(parts) != split + (4 + dtype.itemsize if beside else 0) or beside < 0:
        raise ValueError(f"{len(parts)} parts are not those of codes with {beside} entries beside")
    codes = symbols.decoded(parts[:split], known, count)
    if not beside:
        return codes, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=dtype)
    places = planes.decoded(parts[split : split + 4], torch.int32, beside).long().cumsum_(0)
    if int(places[0]) < 0 or int(places[-1]) >= count or bool((places.diff() <= 0).any()):
        raise ValueError("entries are kept for places that are none")
    return codes, places, planes.decoded(parts[split + 4 :], dtype, beside)
