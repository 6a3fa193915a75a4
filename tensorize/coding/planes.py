"""Entries as they are, in fewer bytes: the upper bytes of numbers are alike, so planes are coded.

A number's sign comes last, so that the exponent fills the first byte of a float32 or a bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.coding.symbols import squeezed, unsqueezed

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encoded(entries: Tensor) -> list[bytes]:
    """Entries (N,) of a dtype of up to eight bytes: one part a plane."""
    held = as_integers(entries)
    if entries.is_floating_point() and held.element_size() > 1:
        held = (held << 1) | (held < 0).to(held.dtype)
    planes = held.view(torch.uint8).reshape(-1, held.element_size()).T
    return [squeezed(plane.contiguous()) for plane in planes]


def decoded(parts: Sequence[memoryview], dtype: torch.dtype, count: int) -> Tensor:
    """The entries (N,) of ``encoded``, bit for bit.

    Raises:
        ValueError: they are damaged.
    """
    planes = [unsqueezed(part, count) for part in parts]
    integers = _INTEGERS[dtype.itemsize]
    held = torch.stack(planes, -1).reshape(-1).view(integers)
    if dtype.is_floating_point and dtype.itemsize > 1:
        upper = held << (8 * dtype.itemsize - 1)
        held = ((held >> 1) & torch.iinfo(integers).max) | upper
    return held.view(dtype)


def as_integers(entries: Tensor) -> Tensor:
    """The bits of entries."""
    return entries.view(_INTEGERS[entries.element_size()])
