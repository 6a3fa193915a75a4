"""Memory that nothing uses any more, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from torch import Tensor

_ELEMENTS = 4_000_000


def give_back() -> None:
    """Return what was freed to the system, where the C library keeps it: glibc does.

    Between tensors that stay lie holes of those that went, which count as the process's memory: as
    much again as all tensors of an analysis. It takes some milliseconds.
    """
    if trim := _trim():
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library can be asked, as on Windows
        return None


def in_rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of equally many rows (rows, …) in parts of rows, each of some megabytes.

    What is made of one part after the other is never there of all rows at once.
    """
    width = max(tensor[:1].numel() for tensor in tensors)
    parts = (tensor.split(max(_ELEMENTS // max(width, 1), 1)) for tensor in tensors)
    return list(zip(*parts, strict=True))
