"""Columns in another order, as fast as a CPU has it in torch.

Every element is read by an index, which takes longer than copying it and is what a weight without
an identity pays (``algebra.pivot``). Nanoseconds an element, one thread of Zen 5, 256 rows of 768:

| | float32 | bfloat16 |
|---|---|---|
| ``index_select`` | 0.28 | 1.43 |
| ``gather`` | 0.31 | 0.56 |
| ``gather`` of bits as int16 | | 0.37 |
| ``index_select`` and its gradient | 2.6 | 4.2 |
| this and its gradient | 0.8 | 1.0 |
| a layer norm by inductor, then this | 0.6 | 0.7 |
| a layer norm by inductor with ``index_select`` fused | 1.4 | 2.3 |

These are of memory that is used again and again. Among the other layers of a model the result lies
in memory that is new, and ``index_select`` in float32 takes 0.7 to 1.2: so it is calibrated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensorize.ir.machine import Machine, lookup_time

# One operation that inductor leaves as it is: fused, what comes before is no longer vectorized.
library = torch.library.Library("tensorize", "FRAGMENT")
library.define("in_order(Tensor x, Tensor order) -> Tensor")
OPERATION = torch.ops.tensorize.in_order.default


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """The columns of x (…, N) in an order (N,) that names each once."""
    if not _has_own_way(x):
        return x.index_select(-1, order)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return OPERATION(x, order)
    return _in_order(x, order)  # the dispatcher takes as long as one row does


def in_order_time(machine: Machine, rows: Any, width: Any, dtype: str) -> Any:
    """Microseconds of ``in_order``: an index takes longer than an element's bytes do."""
    by_index = 1e6 * (machine.launch + machine.by_index * rows * width)
    return np.maximum(lookup_time(machine, rows, width, dtype), by_index)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes an order."""
    places = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter(0, order.long(), places)


def _has_own_way(x: Tensor) -> bool:
    """Whether it is an ordinary tensor of a CPU: transforms of functions see through torch's
    operations only, and who loads a graph that is kept may have no others."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


@torch.library.impl(library, "in_order", "CPU")
def _in_order(x: Tensor, order: Tensor) -> Tensor:
    if x.dtype.itemsize != 2 or x.numel() == len(order):  # one row is not worth more calls
        return x.index_select(-1, order)
    return x.view(torch.int16).gather(-1, order.long().expand(x.shape)).view(x.dtype)


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
