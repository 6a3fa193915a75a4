"""Checks inside of compiled graphs: nodes that count wrong rows, and one operation that looks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.checking.identity import LOOKUP, working
from tensorize.checking.memory import COUNT
from tensorize.checking.use import Use, name_of

_guards: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def known(key: str, guard: Any) -> None:
    """Let a graph find a model's guard by a key."""
    _guards[key] = guard


@torch.compiler.assume_constant_result
def traced(key: str) -> bool:
    """Let a model's guard know, while a graph of it is made, that it has one."""
    guard = _guards.get(key)
    if guard is not None:
        guard.traced = True
    return True


def count(module: nn.Module, use: Use, x: Tensor, y: Tensor) -> None:
    """Add the wrong rows of a product to the module's count: pointwise work and sums, no call."""
    limit, exact = use.limits.get(name_of(x, y)), use.exact
    if limit is None or exact is None:
        return
    dtype = working(y.dtype if use.contract == LOOKUP else torch.promote_types(x.dtype, y.dtype))
    vectors = use.rounded.get(dtype, exact)
    with torch.no_grad():
        outputs = y.detach().to(dtype)
        seen = (outputs * vectors.signs.to(dtype)).sum(-1)
        if use.contract == LOOKUP:
            assert vectors.sizes is not None
            expected, scale = vectors.sums.to(dtype)[x], vectors.sizes.to(dtype)[x]
        else:
            inputs = x.detach().to(dtype)
            expected = (inputs * vectors.sums.to(dtype)).sum(-1) + vectors.offset.to(dtype)
            scale = inputs.square().sum(-1).sqrt()
        allowed = (limit.relative * scale).clamp(min=limit.floor)
        right = (seen - expected).abs() <= allowed
        wrong = (~right & torch.isfinite(scale)).sum()
        module._buffers[COUNT].add_(wrong)  # type: ignore[union-attr]


@torch.library.custom_op("tensorize::settle_faults", mutates_args=("counts",))
def settle(counts: list[Tensor], key: str) -> None:
    """Hand what a graph counted to the model's guard, once a call."""
    guard = _guards.get(key)
    if guard is not None:
        guard.settle_counts()


@settle.register_fake
def _(counts: list[Tensor], key: str) -> None:
    return None
