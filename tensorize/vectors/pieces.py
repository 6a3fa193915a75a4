"""Pieces of a vector, and the calls that cut others out of them.

No tensor is needed for that, so that dynamo follows it: a piece is where its numbers begin, and the
shape in which they follow each other. A view whose numbers lie apart is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_SHAPES = (torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
_NARROWS = (torch.narrow, torch.Tensor.narrow)
_FLATTENS = (torch.flatten, torch.Tensor.flatten, torch.ravel, torch.Tensor.ravel)
_SPLITS = (torch.split, torch.Tensor.split)


@dataclass(frozen=True, order=True)
class Piece:
    """Numbers of a vector from ``begin`` on, in a shape."""

    begin: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape)

    def meets(self, other: Piece) -> bool:
        """Whether the two have numbers in common."""
        return self.begin < other.end and other.begin < self.end

    def cut(self, dim: int, first: int, length: int) -> Piece | None:
        """So many entries of one axis, where the numbers of these follow each other."""
        shape = self.shape
        if math.prod(shape[:dim]) != 1:
            return None
        begin = self.begin + first * math.prod(shape[dim + 1 :])
        return Piece(begin, (*shape[:dim], length, *shape[dim + 1 :]))


def pieces_of(
    piece: Piece, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Piece | tuple[Piece, ...] | None:
    """The piece, or pieces, that a call of a function shows of one; None: it does something else.

    Args:
        args: what comes after the piece itself.
    """
    if func is torch.Tensor.__getitem__:
        return _indexed(piece, args[0])
    if func is torch.Tensor.contiguous and not args:
        return piece
    if func in _FLATTENS and not args and not kwargs:
        return Piece(piece.begin, (piece.end - piece.begin,))
    if kwargs:
        return None
    if func in _SHAPES:
        return _shaped(piece, args)
    if func in _NARROWS and len(args) == 3:
        dim = args[0] % len(piece.shape)
        first = args[1] + piece.shape[dim] if args[1] < 0 else args[1]
        inside = 0 <= first <= first + args[2] <= piece.shape[dim]
        return piece.cut(dim, first, args[2]) if inside else None
    if func in _SPLITS:
        return _split(piece, *args)
    return None


def _shaped(piece: Piece, args: Sequence[Any]) -> Piece | None:
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else tuple(args)
    if not all(isinstance(size, int) for size in shape):
        return None
    numbers, known = piece.end - piece.begin, 1
    for size in shape:
        known *= 1 if size == -1 else size
    if -1 in shape and known > 0:
        shape = tuple(numbers // known if size == -1 else size for size in shape)
    # What does not fit is for torch to refuse.
    return Piece(piece.begin, shape) if math.prod(shape) == numbers else None


def _split(piece: Piece, size: Any, dim: int = 0) -> tuple[Piece, ...] | None:
    dim = dim % len(piece.shape)
    whole = piece.shape[dim]
    if isinstance(size, int):
        if size < 1:
            return None
        sizes = [min(size, whole - first) for first in range(0, whole, size)]
    else:
        sizes = list(size)
    if sum(sizes) != whole:
        return None
    found, first = [], 0
    for length in sizes:
        part = piece.cut(dim, first, length)
        if part is None:
            return None
        found.append(part)
        first += length
    return tuple(found)


def _indexed(piece: Piece, index: Any) -> Piece | None:
    """A piece by slices without steps, numbers of rows, and dots."""
    indices = list(index) if isinstance(index, tuple) else [index]
    named = sum(i is not Ellipsis for i in indices)
    if indices.count(Ellipsis) > 1 or named > len(piece.shape):
        return None
    if Ellipsis in indices:
        where = indices.index(Ellipsis)
        indices[where : where + 1] = [slice(None)] * (len(piece.shape) - named)
    picked: list[int] = []
    for dim, i in enumerate(indices):
        size = piece.shape[dim]
        if isinstance(i, slice):
            first, last, step = i.indices(size)
            if step != 1:
                return None
            if (first, last) == (0, size):
                continue
            length = max(last - first, 0)
        elif isinstance(i, int) and not isinstance(i, bool) and -size <= i < size:
            first, length = i % size, 1
            picked.append(dim)
        else:
            return None
        found = piece.cut(dim, first, length)
        if found is None:
            return None
        piece = found
    shape = tuple(size for dim, size in enumerate(piece.shape) if dim not in picked)
    return Piece(piece.begin, shape)
