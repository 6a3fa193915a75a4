"""Calls that only look at a weight in another way, and functions whose bodies use weights.

The transpose of a weight, a multiple of it, one expert of a stack or some of its rows are told as a
``Frame``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import isfinite
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.capture.matmul import Frame

_TRANSPOSES = (torch.t, torch.Tensor.t, torch.transpose, torch.Tensor.transpose)
_TRANSPOSED_PROPERTIES = {2: ("T", "mT"), 3: ("mT",)}
_NARROWS = (torch.narrow, torch.Tensor.narrow)
_CHUNKS = (torch.chunk, torch.Tensor.chunk)
_SPLITS = (torch.split, torch.Tensor.split, torch.functional.split)
DETACHES = (torch.Tensor.detach, torch.detach)
_IDENTITIES = (torch.Tensor.contiguous, *DETACHES)
_CASTS = (torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.type)
_TIMES = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_OVER = (torch.div, torch.Tensor.div, torch.Tensor.__truediv__)


def view(
    func: Any, args: tuple, kwargs: dict, frame: Frame, weight: Any
) -> Frame | tuple[Frame, ...] | None:
    """The frames of what the call returns if it only looks at ``weight`` another way, else None."""
    if (scale := _scale(func, args, kwargs, weight)) is not None:
        return replace(frame, scale=frame.scale * scale)
    if not args or args[0] is not weight:
        return None
    dims = weight.dim()
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    if func in _IDENTITIES or (func in _CASTS and _keeps_dtype(func, args, kwargs, weight)):
        return frame
    if func is torch.Tensor.view_as and len(args) == 2 and args[1].shape == weight.shape:
        return frame
    if func is torch.Tensor.__getitem__ and _is_all(args[1], weight.shape):
        return frame
    if dims not in (2, 3) or frame.shape is not None:
        return None  # a convolution's weight
    if name == "__get__" and getattr(owner, "__name__", "") in _TRANSPOSED_PROPERTIES[dims]:
        return replace(frame, transposed=not frame.transposed)
    if func in _TRANSPOSES:
        axes = sorted(a % dims for a in args[1:3] if isinstance(a, int)) or [0, 1]
        axes = sorted(a % dims for a in kwargs.values()) or axes
        if axes == [dims - 2, dims - 1] and (dims == 2 or len(args) + len(kwargs) == 3):
            return replace(frame, transposed=not frame.transposed)
        return None
    if func is torch.Tensor.__getitem__ and dims == 3 and frame.expert is None:
        return replace(frame, expert=args[1]) if _picks(args[1]) else None
    if dims == 2 and not frame.transposed:
        return _parts(func, args, kwargs, frame, weight.shape[0])
    return None


def _scale(func: Any, args: tuple, kwargs: dict, weight: Any) -> float | None:
    """What a matrix of floating-point numbers is multiplied by, where it is one number."""
    if kwargs or len(args) != 2 or weight.dim() < 2 or not weight.is_floating_point():
        return None
    number = args[1] if args[0] is weight else args[0] if func in _TIMES else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if func in _TIMES:
        scale = float(number)
    elif func in _OVER and number:
        scale = 1 / number
    else:
        return None
    return scale if scale and isfinite(scale) else None


def _parts(
    func: Any, args: tuple, kwargs: dict, frame: Frame, rows: int
) -> Frame | tuple[Frame, ...] | None:
    """The frames of some rows of a matrix: ``w[a:b]``, ``narrow``, ``split`` and ``chunk``."""
    if func is torch.Tensor.__getitem__:
        index = args[1]
        if isinstance(index, tuple) and len(index) == 2 and index[1] == slice(None):
            index = index[0]
        if not isinstance(index, slice):
            return None
        first, end, step = index.indices(rows)
        return frame.slice_rows(first, end) if step == 1 and end > first else None
    given = [*args[1:], *(value for name, value in kwargs.items() if name != "dim")]
    if func in _NARROWS and len(given) == 3 and not kwargs and given[0] == 0:
        first = given[1] + rows if given[1] < 0 else given[1]
        inside = 0 <= first <= first + given[2] <= rows  # else the dense weight says what is wrong
        return frame.slice_rows(first, first + given[2]) if inside else None
    if func not in (*_CHUNKS, *_SPLITS) or not given:
        return None
    if kwargs.get("dim", args[2] if len(args) > 2 else 0) != 0:
        return None
    if func in _CHUNKS:
        size = -(-rows // given[0])
    elif isinstance(given[0], int):
        size = given[0]
    else:
        ends = [0]
        for length in given[0]:
            ends.append(ends[-1] + length)
        if ends[-1] != rows:
            return None
        return tuple(frame.slice_rows(a, b) for a, b in pairwise(ends))
    return tuple(frame.slice_rows(a, min(a + size, rows)) for a in range(0, rows, size))


def _is_all(index: Any, shape: tuple[int, ...]) -> bool:
    """Whether an index takes all that there is, as code that may keep fewer modes writes it."""
    if not isinstance(index, tuple) or len(index) > len(shape):
        return False
    pairs = zip(index, shape, strict=False)
    return all(isinstance(i, slice) and i.indices(size) == (0, size, 1) for i, size in pairs)


def _picks(index: Any) -> bool:
    """Whether an index gives one matrix of a stack, or a new stack of some."""
    if isinstance(index, bool):
        return False
    return isinstance(index, int) or (
        isinstance(index, Tensor)
        and index.dim() <= 1
        and not index.is_floating_point()
        and index.dtype != torch.bool  # a mask: it adds an axis
    )


def _keeps_dtype(func: Any, args: tuple, kwargs: dict, weight: Any) -> bool:
    if func is torch.Tensor.float:
        return weight.dtype == torch.float32
    if func is torch.Tensor.type:
        return len(args) == 2 and args[1] is weight.dtype
    wanted = [a for a in (*args[1:], *kwargs.values()) if a is not None]
    for value in wanted:
        dtype = value.dtype if isinstance(value, Tensor) else value
        device = value.device if isinstance(value, Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype != weight.dtype:
            return False
        if isinstance(device, torch.device | str) and torch.device(device) != weight.device:
            return False
    return bool(wanted) and func in (torch.Tensor.to, torch.Tensor.type_as)


# ------------------------------------------------------- functions that are made of others


def _without_dispatch(func: Any) -> Any:
    """A Python function of torch that runs its own body, whatever its arguments override."""
    never = {"has_torch_function": _no, "has_torch_function_unary": _no}
    return FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__
    )


def _no(*_: Any) -> bool:
    return False


COMPOSITES: dict[Any, Any] = {
    F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward),
}
"""Functions to be looked into: their bodies use weights by the calls above."""
