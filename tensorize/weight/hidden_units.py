"""Hidden units in the order in which a weight that stores no identity reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from tensorize.formats.order import columns
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight.low_rank import LowRankLinear


def readers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The linears, by name, that put what they read in an order, each for itself."""
    held = _holders(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        and _reads_in_order(module.spec)
        and module.input_product is None
        and _is_alone(module, held)
        and not _hooked(module)
    }


def may_reorder(model: nn.Module) -> dict[str, nn.Module]:
    """The linears, by name, whose rows can be put in another order."""
    held = _holders(model)
    return {
        name: module
        for name, module in linears(model).items()
        if _is_alone(module, held) and not _hooked(module)
    }


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Dense linears and such of low rank, by name: without those that the latter are made of."""
    inside = {
        id(child) for m in model.modules() if isinstance(m, LowRankLinear) for child in m.children()
    }
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, LowRankLinear))
        and id(module) not in inside
    }


@torch.no_grad()
def align(reader: LowRankLinear, makers: Collection[nn.Module]) -> TTSpec:
    """Let those that make what a linear reads compute it in the reader's order; its new spec.

    Parameters are new ones: a dense model may have the old.
    """
    spec = reader.spec
    assert isinstance(spec, TTSpec)
    n = spec.shape[-1]
    order = columns(reader.order, n).long()
    for maker in makers:
        last = maker.second if isinstance(maker, LowRankLinear) else maker
        for name, held in list(last.named_parameters(recurse=False)):
            moved = nn.Parameter(held.detach()[order.to(held.device)], held.requires_grad)
            last.register_parameter(name, moved)
    straight = spec.in_order_of(n)
    reader.resize(straight, [*reader.weight.cores, torch.zeros_like(reader.order[:1])])
    return straight


def _reads_in_order(spec: Spec) -> bool:
    return 0 < spec.pivoted < spec.shape[-1]


def _holders(model: nn.Module) -> Counter[int]:
    """How often each parameter is there, by its id."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def _is_alone(module: nn.Module, held: Counter[int]) -> bool:
    """Whether nothing else has its parameters: of a first factor many may have a part."""
    parts: list[Tensor] = list(module.parameters())
    if isinstance(module, LowRankLinear):
        parts = list(module.second.parameters())
    return bool(parts) and all(held[id(p)] == 1 for p in parts)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody may look at what it reads or gives."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
