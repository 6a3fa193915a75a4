"""Checks inside of compiled graphs: nodes that count wrong rows, and one operation that looks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensorize.checking.identity import LOOKUP, Weight, other_side, times, working
from tensorize.checking.use import Use, unrounded_name

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
    trains = torch.is_grad_enabled() and y.requires_grad
    limit, exact = use.limits.get(use.name(x, y, gradients=trains)), use.exact
    traced(site.guard.key)
    if limit is None or exact is None or (trains and use.contract == LOOKUP):
        return
    dtype = working(y.dtype if use.contract == LOOKUP else torch.promote_types(x.dtype, y.dtype))
    vectors = use.rounded.get(dtype, exact)
    limits = limit.relative, limit.floor
    unrounded = use.limits.get(unrounded_name(x), limit)  # what a kernel is held to
    with torch.no_grad():
        if use.contract == LOOKUP:
            assert vectors.sizes is not None
            seen = (y.to(dtype) * vectors.signs.to(dtype)).sum(-1)
            expected, scale = vectors.sums.to(dtype)[x], vectors.sizes.to(dtype)[x]
            site.count.add_(_beyond(seen - expected, scale, *limits))
        elif trains:
            signs, _, offset = vectors.many or (vectors.signs[:, None], None, vectors.offset)
            signs = signs.to(dtype)
            sums = times(matrix, signs.t().double(), other_side(use.contract)).t().to(dtype)
            offset = offset.to(dtype) if bias is None else bias.detach().to(dtype) @ signs
            one, many = (signs[:, 0], sums[:, 0], offset[:1]), (signs, sums, offset)
            many = None if vectors.many is None else many
            found = x.detach(), y.detach(), *one, many, limits, limits, site.guard.key
            site.count.add_(wrong_rows(*found) * TRAINING)
        else:
            # Exported programs run where this operation is not known.
            count = wrong_rows if torch.compiler.is_exporting() else torch.ops.tensorize.wrong_rows
            made = vectors.signs, vectors.sums, vectors.offset
            launch = [unrounded.relative, unrounded.floor]
            site.count.add_(count(x, y, *made, vectors.many, limits, launch, site.guard.key))


def wrong_rows(
    x: Tensor, y: Tensor, signs: Tensor, sums: Tensor, offset: Tensor,
    many: Sequence[Tensor] | None, limits: Sequence[float], unrounded: Sequence[float], key: str,
) -> Tensor:  # fmt: skip
    """How many rows of y = x Wᵀ + bias are wrong: one operation for what lowers graphs, whose
    kernels may count instead; pointwise work and sums for inductor.

    ``limits``: of y as it is; ``unrounded``: of y before it was rounded. ``key``: of the guard.
    """
    if many is None:
        return _beyond(*_off(x, y, signs, sums, offset), *limits)
    signs, sums, offset = many
    x, y = x.float(), y.float()
    off = (y @ signs - x @ sums - offset).abs().amax(-1)
    outward = y.square().sum(-1).sqrt()
    scale = torch.where(torch.isfinite(outward), outward, 0.0)
    return _beyond(off, torch.where(torch.isfinite(x.square().sum(-1)), scale, torch.inf), *limits)


def _off(
    x: Tensor, y: Tensor, signs: Tensor, sums: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """How far off rows are by one sum, and what rounding is relative to."""
    dtype = working(torch.promote_types(x.dtype, y.dtype))
    seen = (y.to(dtype) * signs.to(dtype)).sum(-1)
    inputs = x.to(dtype)
    expected = (inputs * sums.to(dtype)).sum(-1) + offset.to(dtype)
    return seen - expected, inputs.square().sum(-1).sqrt()


def _beyond(off: Tensor, scale: Tensor, relative: float, floor: float) -> Tensor:
    right = off.abs() <= (relative * scale).clamp(min=floor)
    return (~right & torch.isfinite(scale)).sum()


_library = torch.library.Library("tensorize", "FRAGMENT")
_library.define(
    "wrong_rows(Tensor x, Tensor y, Tensor signs, Tensor sums, Tensor offset, Tensor[]? many, "
    "float[] limits, float[] unrounded, str key) -> Tensor"
)
_library.impl("wrong_rows", wrong_rows, "CompositeImplicitAutograd")


@torch.library.custom_op("tensorize::settle_faults", mutates_args=("counts",))
def settle(counts: list[Tensor], key: str) -> None:
    """Hand what a graph counted to the model's guard, once a call."""
    guard = _guards.get(key)
    if guard is not None:
        guard.settle_counts()


@settle.register_fake
def _(counts: list[Tensor], key: str) -> None:
    return None
