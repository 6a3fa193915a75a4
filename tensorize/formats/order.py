"""Columns in another order, as fast as a CPU has it in torch.

Every element is read by an index, which takes longer than copying it and is what a weight without
an identity pays (``algebra.pivot``). Nanoseconds an element, one thread of Zen 5, 256 rows of 768:

| | float32 | bfloat16 |
|---|---|---|
| ``index_select`` | 0.28 | 1.43 |
| ``gather`` | 0.31 | 0.56 |
| ``gather`` of bits as int16 | | 0.37 |
| ``gather`` of words of two columns, of four | | 0.23, 0.15 |
| ``index_select`` and its gradient | 2.6 | 4.2 |
| this and its gradient | 0.8 | 1.0 |
| a layer norm by inductor, then this | 0.6 | 0.7 |
| a layer norm by inductor with ``index_select`` fused | 1.4 | 2.3 |

These are of memory that is used again and again. Among the other layers of a model the result lies
in memory that is new, and ``index_select`` in float32 takes 0.7 to 1.2. It is fast for two axes
only: of an input (64, 20, 1536) it takes 6 to 13 ns on an Intel Xeon, by a loop over the last axis,
``gather`` 0.9 to 1.3, and ``index_select`` of all rows as one matrix 0.7 to 0.8. So words of four
bytes are read as float32 in two axes, all others are gathered, and what it takes is calibrated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensorize.algebra.pivot import columns
from tensorize.ir.machine import Machine, bytes_of, lookup_time, matmul_time

# One operation that inductor leaves as it is: fused, what comes before is no longer vectorized.
library = torch.library.Library("tensorize", "FRAGMENT")
library.define("in_order(Tensor x, Tensor order) -> Tensor")
MANY = 256
"""Rows at which the pass over an input counts."""

_SHARE = 0.05
"""The part of a layer's time that the pass over its input may take before groups are read."""

OPERATION = torch.ops.tensorize.in_order.default


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """The columns of x (…, N) in an order (N / g,) that names each group of g neighbours once."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _by_groups(x, order)  # sizes are tensors, of which nothing is known
    if order.shape[0] == 1:
        return x
    if not _has_own_way(x):
        alone = isinstance(x, Tensor) and len(order) == x.shape[-1]
        return x.index_select(-1, order) if alone else _by_groups(x, order)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return OPERATION(x, order)
    return _in_order(x, order)  # the dispatcher takes as long as one row does


def in_order_time(machine: Machine, rows: Any, width: Any, dtype: str, neighbours: int = 1) -> Any:
    """Microseconds of ``in_order``: an index takes longer than an element's bytes do."""
    if neighbours == width:
        return 0.0
    read = -(-bytes_of(dtype) * neighbours // 8) if neighbours > 1 else 1  # of eight bytes at most
    by_index = 1e6 * (machine.launch + machine.by_index * rows * width * read / neighbours)
    return np.maximum(lookup_time(machine, rows, width, dtype), by_index)


def neighbours(machine: Machine, m: int, n: int, rows: int, dtype: str) -> int:
    """How many columns of a weight (m, n) are to stay together: as few as will do.

    That is so that the pass takes a small share of the time of plain factors of half the numbers.
    Words of eight bytes are the largest that are read as fast as smaller ones, and of float32 an
    index of single ones is as fast.
    """
    if bytes_of(dtype) != 2:
        return 1
    rank = max(1, m * n // (2 * (m + n)))
    plain = matmul_time(machine, rows, n, rank, dtype) + matmul_time(machine, rows, rank, m, dtype)
    fit = [count for count in (1, 2, 4) if n % count == 0]
    short = (c for c in fit if in_order_time(machine, rows, n, dtype, c) <= _SHARE * plain)
    return next(short, fit[-1])


def inverse(order: Tensor) -> Tensor:
    """The order that undoes an order."""
    places = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter(0, order.long(), places)


def _has_own_way(x: Tensor) -> bool:
    """Whether it is an ordinary tensor of a CPU: transforms of functions see through torch's
    operations only, and who loads a graph that is kept may have no others."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch.compiler.is_exporting():
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


@torch.library.impl(library, "in_order", "CPU")
def _in_order(x: Tensor, order: Tensor) -> Tensor:
    n, count = x.shape[-1], order.shape[0]
    width = n // count
    if x.numel() > n:  # one row is not worth more calls
        word = _word(x, width)
        if word is not None:
            words = x.view(word)
            index = columns(order, words.shape[-1])
            if word is torch.float32:
                return words.flatten(0, -2).index_select(1, index).view(x.dtype).view(x.shape)
            return words.gather(-1, index.long().expand(words.shape)).view(x.dtype)
    if width == 1:
        return x.index_select(-1, order)
    return _by_groups(x, order)


def _by_groups(x: Tensor, order: Tensor) -> Tensor:
    return x.unflatten(-1, (order.shape[0], -1)).index_select(-2, order).flatten(-2)


def _word(x: Tensor, width: int) -> torch.dtype | None:
    """What groups of so many columns are read as; None where they cannot be."""
    size = min(width * x.itemsize, 8)
    apart = (*x.stride()[:-1], x.storage_offset())
    odd = any(step % (size // x.itemsize) for step in apart)
    if odd or size not in _WORDS or x.stride(-1) != 1:
        return None
    return _WORDS[size]


_WORDS = {2: torch.int16, 4: torch.float32, 8: torch.int64}


@torch.library.register_fake("tensorize::in_order", lib=library)
def _(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_order(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (order,) = ctx.saved_tensors
    return in_order(gradient, inverse(order)), None


torch.library.register_autograd(
    "tensorize::in_order", _gradient, setup_context=_keep_order, lib=library
)
