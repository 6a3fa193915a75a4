"""Checks inside of compiled graphs: nodes that count wrong rows, and one operation that looks."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensorize.checking.identity import LOOKUP, Weight, other_side, times, working
from tensorize.checking.use import Use, name_of

if TYPE_CHECKING:
    from tensorize.checking.site import Site

_guards: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


TRAINING = 2**32
"""What a wrong row counts in a graph that makes its sums of the weight itself."""


def guards() -> list[Any]:
    """Those of all guarded models."""
    return list(_guards.values())


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


def count(site: Site, use: Use, matrix: Weight, bias: Tensor | None, x: Tensor, y: Tensor) -> None:
    """Add the wrong rows of a product to the site's count: pointwise work and sums, no call.

    What x meets was made of the weight when the model was guarded. While it trains, the weight is
    another one in every step, and the graph makes it; not for a table, which would be read whole.
    """
    limit, exact = use.limits.get(name_of(x, y)), use.exact
    trains = torch.is_grad_enabled() and y.requires_grad
    traced(site.guard.key)
    if limit is None or exact is None or (trains and use.contract == LOOKUP):
        return
    dtype = working(y.dtype if use.contract == LOOKUP else torch.promote_types(x.dtype, y.dtype))
    vectors = use.rounded.get(dtype, exact)
    with torch.no_grad():
        signs = vectors.signs.to(dtype)
        seen = (y.detach().to(dtype) * signs).sum(-1)
        if use.contract == LOOKUP:
            assert vectors.sizes is not None
            expected, scale = vectors.sums.to(dtype)[x], vectors.sizes.to(dtype)[x]
        else:
            sums, offset = vectors.sums.to(dtype), vectors.offset.to(dtype)
            if trains:
                sums = times(matrix, signs[None].double(), other_side(use.contract))[0].to(dtype)
                offset = offset if bias is None else (bias.detach().to(dtype) * signs).sum()
            inputs = x.detach().to(dtype)
            expected = (inputs * sums).sum(-1) + offset
            scale = inputs.square().sum(-1).sqrt()
        allowed = (limit.relative * scale).clamp(min=limit.floor)
        right = (seen - expected).abs() <= allowed
        wrong = (~right & torch.isfinite(scale)).sum()
        site.count.add_(wrong * TRAINING if trains else wrong)


@torch.library.custom_op("tensorize::settle_faults", mutates_args=("counts",))
def settle(counts: list[Tensor], key: str) -> None:
    """Hand what a graph counted to the model's guard, once a call."""
    guard = _guards.get(key)
    if guard is not None:
        guard.settle_counts()


@settle.register_fake
def _(counts: list[Tensor], key: str) -> None:
    return None
