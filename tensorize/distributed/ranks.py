"""The ranks that share a tensor, and what they tell each other: sums, and parts put together.

Each is a function with a gradient. A tensor is *replicated* where all ranks hold the same,
*partial* where the sum over the ranks is meant, and *split* where each holds its part of the last
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tensorize.formats.order import in_order, inverse
from tensorize.training.checkpointing import ALWAYS_SAVED


@dataclass(frozen=True)
class Ranks:
    """One dimension of a mesh: the name of its process group, how many ranks, which this is, and
    which ``processes`` they are."""

    group: str
    count: int
    this: int
    processes: tuple[int, ...] = ()

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        processes = tuple(mesh.mesh.flatten().tolist())
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank(), processes)

    def part(self, size: int) -> slice:
        """This rank's part of so many entries, which the ranks divide."""
        each = size // self.count
        return slice(self.this * each, (self.this + 1) * each)


def _sum(x: Tensor, ranks: Ranks) -> Tensor:
    return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", ranks.group))


def _gather(x: Tensor, ranks: Ranks) -> Tensor:
    first = x.movedim(-1, 0).contiguous()
    whole = torch.ops._c10d_functional.all_gather_into_tensor(first, ranks.count, ranks.group)
    return _waited(whole).movedim(0, -1).contiguous()


def _scatter(x: Tensor, ranks: Ranks) -> Tensor:
    first = x.movedim(-1, 0).contiguous()
    how = "sum", ranks.count, ranks.group
    own = _waited(torch.ops._c10d_functional.reduce_scatter_tensor(first, *how))
    return own.movedim(0, -1).contiguous()


def _waited(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return _sum(x, ranks)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None


class _Fanned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _sum(g, ctx.ranks), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, partial: bool) -> Tensor:
        ctx.ranks, ctx.partial = ranks, partial
        return _gather(x, ranks)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        if ctx.partial:
            return _scatter(g, ctx.ranks), None, None
        return g[..., ctx.ranks.part(g.shape[-1])].contiguous(), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _scatter(x, ranks)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _gather(g, ctx.ranks), None


def summed(x: Tensor, ranks: Ranks) -> Tensor:
    """A partial tensor made a replicated one, whose gradient is replicated."""
    return _Summed.apply(x, ranks)  # type: ignore[return-value]


def fanned(x: Tensor, ranks: Ranks) -> Tensor:
    """A replicated tensor whose gradient is partial: each rank goes on with a part of its own."""
    return _Fanned.apply(x, ranks)  # type: ignore[return-value]


def gathered(x: Tensor, ranks: Ranks, *, partial: bool) -> Tensor:
    """A split tensor made a replicated one; ``partial``: whether its gradient is."""
    return _Gathered.apply(x, ranks, partial)  # type: ignore[return-value]


def scattered(x: Tensor, ranks: Ranks) -> Tensor:
    """A partial tensor made a split one."""
    return _Scattered.apply(x, ranks)  # type: ignore[return-value]


# ------------------------------------------------------------- a product and its reduction as one


@torch.library.custom_op("tensorize::reduced_product", mutates_args=())
def reduced_product(
    x: Tensor,
    weights: Sequence[Tensor],
    orders: Sequence[Tensor],
    squares: Tensor | None,
    group: str,
    this: int,
) -> tuple[Tensor, Tensor]:
    """The sum over ranks of x Wᵀ for all weights side by side, and of ``squares``.

    One operation, so that a checkpointed block that saves its outputs computes and communicates
    nothing of it again. The two are one message where they have one dtype, else two at a time.

    Args:
        x: (…, n), this rank's columns.
        weights: each (r, n), or (r, n - k) where k columns of W are an identity's.
        orders: for each weight its columns (n,), those k first, or an empty one where it has all;
            empty where all have all.
        squares: (…, 1), float32; None gives an empty tensor back.
        group: the name of the process group.
        this: which rank this is: the k columns are the identity's in its rows.
    """
    narrow = products(x, weights, orders, this)
    reduce = torch.ops._c10d_functional.all_reduce
    if squares is None:
        return _waited(reduce(narrow, "sum", group)), x.new_empty(0, dtype=torch.float32)
    if narrow.dtype == squares.dtype:
        both = _waited(reduce(torch.cat([narrow, squares], -1), "sum", group))
        return both[..., :-1].contiguous(), both[..., -1:].contiguous()
    parts = [reduce(narrow, "sum", group), reduce(squares, "sum", group)]
    return _waited(parts[0]), _waited(parts[1])


def products(x: Tensor, weights: Sequence[Tensor], orders: Sequence[Tensor], this: int) -> Tensor:
    """What this rank adds to ``reduced_product``."""
    if not orders:
        return x @ _side_by_side(weights).t()
    each = zip(weights, orders, strict=True)
    return torch.cat([_product(x, weight, order, this) for weight, order in each], -1)


def _product(x: Tensor, weight: Tensor, order: Tensor, this: int) -> Tensor:
    """x times a weight transposed; what meets an identity is added to this rank's rows."""
    if not len(order):
        return x @ weight.t()
    kept, others = in_order(x, order).tensor_split([x.shape[-1] - weight.shape[1]], -1)
    y = others @ weight.t()
    _own_rows(y, kept.shape[-1], this).add_(kept)
    return y


def _own_rows(y: Tensor, count: int, this: int) -> Tensor:
    return y.narrow(-1, this * count, count)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(weights)) if len(weights) > 1 else weights[0]


@reduced_product.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    orders: Sequence[Tensor],
    squares: Tensor | None,
    group: str,
    this: int,
) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:-1], sum(w.shape[0] for w in weights)
    other = (0,) if squares is None else squares.shape
    return x.new_empty(shape), x.new_empty(other, dtype=torch.float32)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, ctx.orders, squares, _, ctx.this = inputs
    ctx.with_squares = squares is not None
    ctx.save_for_backward(x, *weights)


def _gradients(ctx: Any, narrow: Tensor, squares: Tensor) -> Any:
    x, *weights = ctx.saved_tensors
    sizes = [weight.shape[0] for weight in weights]
    if not ctx.orders:
        of_x = narrow @ _side_by_side(weights)
        rows = list((narrow.flatten(0, -2).t() @ x.flatten(0, -2)).split(sizes))
    else:
        each = zip(narrow.split(sizes, -1), weights, ctx.orders, strict=True)
        found = [_back(x, *one, ctx.this) for one in each]
        of_x = torch.stack([one for one, _ in found]).sum(0)
        rows = [one for _, one in found]
    of_squares = squares if ctx.with_squares else None
    return of_x, rows, [None] * len(ctx.orders), of_squares, None, None


def _back(x: Tensor, g: Tensor, weight: Tensor, order: Tensor, this: int) -> tuple[Tensor, Tensor]:
    """The gradients of ``_product``, of x and of the weight."""
    of_x, seen = g @ weight, x
    if len(order):
        count = x.shape[-1] - weight.shape[1]
        seen = in_order(x, order)[..., count:]
        of_x = in_order(torch.cat([_own_rows(g, count, this), of_x], -1), inverse(order))
    return of_x, g.flatten(0, -2).t() @ seen.flatten(0, -2)


reduced_product.register_autograd(_gradients, setup_context=_keep)
ALWAYS_SAVED.add(torch.ops.tensorize.reduced_product.default)
