"""What the factorized weights of a model have in common: kernels, products, breakpoints."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tensorize.base.tensors import reals
from tensorize.weight import ties
from tensorize.weight.contractions import Contractions, common_breakpoints
from tensorize.weight.cores import Cores
from tensorize.weight.low_rank import LowRankLinear, SharedProduct, drop_products


def numbers(model: nn.Module) -> int:
    """The parameters of a model, each once, complex ones as two: where codes stand for numbers,
    those numbers."""
    holders = [module for module in model.modules() if isinstance(module, Cores)]
    coded = {id(h.core_0): h for h in holders if h.spec.precision is not None}
    scales = {id(scale) for holder in coded.values() for scale in holder.parameters()}
    own = sum(reals(p) for p in model.parameters() if id(p) not in scales)
    return own + sum(holder.spec.parameters for holder in coded.values())


def use_kernels(model: nn.Module, build: Callable[[Any], Contractions]) -> int:
    """Run the weights that ``build`` has kernels for by those, all others without; how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, LowRankLinear | Cores):
            bent = isinstance(module, LowRankLinear) and module.nonlinearity is not None
            kernels = {} if bent else build(module.spec)
            _set_kernels(module, kernels)
            count += bool(kernels)
    return count


@contextlib.contextmanager
def other_kernels(model: nn.Module, build: Callable[[Any], Contractions]) -> Iterator[None]:
    """``use_kernels``, until the end; then a model runs by what it ran by."""
    modules = [m for m in model.modules() if isinstance(m, LowRankLinear | Cores)]
    before = [module.kernels for module in modules]
    try:
        use_kernels(model, build)
        yield
    finally:
        for module, kernels in zip(modules, before, strict=True):
            _set_kernels(module, kernels)


def _set_kernels(module: LowRankLinear | Cores, kernels: Contractions | None) -> None:
    module.kernels = kernels or None
    if isinstance(module, Cores):
        module._choose_orders()


def settle(model: nn.Module) -> None:
    """What the factorized weights of a whole model have in common: products, and breakpoints."""
    _share_products(model)
    holders = [module for module in model.modules() if isinstance(module, Cores)]
    cores = [holder.get_parameter("core_0") for holder in holders]
    device = str(cores[0].device) if cores else "cpu"
    uses = [(holder.spec, core.dtype) for holder, core in zip(holders, cores, strict=True)]
    breakpoints = common_breakpoints(uses, device)
    for holder in holders:
        holder.breakpoints = breakpoints
        holder._choose_orders()


def breakpoints(model: nn.Module) -> tuple[int, ...] | None:
    """The batches at which the weights of a model change their order (None: not settled)."""
    return next((m.breakpoints for m in model.modules() if isinstance(m, Cores)), None)


def _share_products(model: nn.Module) -> None:
    """Let layers whose first factor is one parameter compute its product with their input once."""
    drop_products(model)
    groups: dict[int, dict[str, LowRankLinear]] = defaultdict(dict)
    for path, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            groups[id(module.first.weight)][path] = module
    same: dict[str, str] = {}
    for layers in groups.values():
        if len({id(layer.second.weight) for layer in layers.values()}) > 1:
            owner = _innermost(model, list(layers))
            first, leading = next(iter(layers.items()))
            product = None if owner is None else SharedProduct(len(layers), leading._buffers)
            if product is not None and owner is not None:
                product.follow(owner)
            for path, layer in layers.items():
                layer.input_product = product
                if path != first:
                    same[f"{path}.first.weight"] = f"{first}.first.weight"
    ties.add(model, same)


def _innermost(model: nn.Module, paths: list[str]) -> nn.Module | None:
    """The innermost module with a forward of its own that has all of several others."""
    parents = [path.split(".")[:-1] for path in paths]
    together = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    parts = [names[0] for names in together]
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if type(module).forward is not nn.Module.forward:  # a list has none
            return module
    return None


def limit_saved(model: nn.Module, memory_limit: int | None = 0) -> None:
    """Limit what each use of a factorized weight saves for its backward pass.

    Args:
        model: its modules are changed in place.
        memory_limit: the most elements, the input among them. What would save more saves its input
            only and computes the rest again; with 0 all that trains a core does. None: no limit.

    Stacks of experts, convolutions and slices of packed weights save what they did.
    """
    for module in model.modules():
        if isinstance(module, Cores) and not module.spec.batch:
            module.memory_limit = memory_limit
            module._choose_orders()
        elif isinstance(module, LowRankLinear) and module.nonlinearity is None:
            module.limit_saved(memory_limit)
