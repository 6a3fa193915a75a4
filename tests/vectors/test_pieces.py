"""Which numbers of a vector a call shows, against torch's own views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensorize.vectors.pieces import Piece, pieces_of

T = torch.Tensor
CUTS: dict[str, tuple[tuple[int, ...], Callable[..., Any], tuple[Any, ...]]] = {
    "a range": ((24,), T.__getitem__, (slice(4, 16),)),
    "from the end": ((24,), T.__getitem__, (slice(-8, None),)),
    "nothing": ((24,), T.__getitem__, (slice(9, 9),)),
    "one number": ((24,), T.__getitem__, (-3,)),
    "rows": ((6, 4), T.__getitem__, (slice(1, 3),)),
    "a row": ((6, 4), T.__getitem__, (2,)),
    "part of a row": ((6, 4), T.__getitem__, ((2, slice(1, 3)),)),
    "of one row": ((1, 24), T.__getitem__, ((slice(None), slice(4, 16)),)),
    "dots": ((1, 24), T.__getitem__, ((..., slice(4, 16)),)),
    "dots for nothing": ((6, 4), T.__getitem__, ((2, ..., 3),)),
    "narrow": ((24,), T.narrow, (0, 4, 8)),
    "narrow, negative": ((1, 24), torch.narrow, (-1, -8, 8)),
    "split": ((24,), torch.split, (10,)),
    "split by sizes": ((1, 24), T.split, ([16, 8], -1)),
    "reshape": ((24,), T.reshape, (4, 6)),
    "reshape by a tuple": ((24,), torch.reshape, ((2, -1, 3),)),
    "view": ((4, 6), T.view, (-1,)),
    "flatten": ((4, 6), T.flatten, ()),
    "contiguous": ((4, 6), T.contiguous, ()),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_begins_where_torch_says(name: str) -> None:
    shape, function, arguments = CUTS[name]
    whole = torch.arange(40.0)[7:31].view(shape)
    wanted = function(whole, *arguments)
    found = pieces_of(Piece(7, shape), function, arguments, {})
    assert found is not None
    one = isinstance(found, Piece)
    for piece, view in zip([found] if one else found, [wanted] if one else wanted, strict=True):
        assert piece.shape == tuple(view.shape)
        assert view.numel() == 0 or piece.begin == view.storage_offset()


@pytest.mark.parametrize(
    ("shape", "function", "arguments"),
    [
        ((6, 4), T.__getitem__, ((slice(None), slice(1, 3)),)),
        ((24,), T.__getitem__, (slice(0, 24, 2),)),
        ((24,), T.__getitem__, (torch.tensor([1, 2]),)),
        ((24,), T.__getitem__, (None,)),
        ((24,), T.__getitem__, (True,)),
        ((24,), T.__getitem__, (24,)),
        ((6, 4), T.narrow, (1, 0, 2)),
        ((6, 4), T.split, (2, 1)),
        ((24,), T.reshape, (5, 5)),
        ((24,), T.view, (torch.float64,)),
        ((24,), T.sum, ()),
        ((6, 4), T.flatten, (0, 1)),
    ],
)
def test_what_is_no_cut_is_left_to_torch(
    shape: tuple[int, ...], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    assert pieces_of(Piece(0, shape), function, arguments, {}) is None
