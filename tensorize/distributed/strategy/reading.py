"""A module read as the planner's workload: its blocks, and which of their weights share an input.

One forward pass runs on tensors without values, and is watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tensorize.base.errors import CaptureError
from tensorize.capture.inputs import check_model, needed
from tensorize.capture.kept import keeping
from tensorize.distributed.strategy.workload import Group, Layer, Linear, Workload
from tensorize.ir.spec import TTSpec
from tensorize.training.memory import as_fake
from tensorize.weight.cores import FactoredLinear
from tensorize.weight.install import is_plain_linear
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear, drop_products

_HEADS = ("num_attention_heads", "n_head", "heads")
_KEYS = "num_key_value_heads"


def workload_of(model: nn.Module, example_inputs: Any = None) -> Workload:
    """The model's layers as the planner sees them.

    Raises:
        CaptureError: it has no list of blocks, no inputs to watch it with, or weights in a block
            that are neither dense nor of low rank.
    """
    model = check_model(model, on_meta=True)
    name, blocks = _blocks(model)
    pairs = {id(m): m for b in blocks for m in b.modules() if isinstance(m, LowRankLinear)}
    halves = {id(half) for pair in pairs.values() for half in (pair.first, pair.second)}
    weights = {
        id(module): (f"{name}.{k}.{path}", module)
        for k, block in enumerate(blocks)
        for path, module in block.named_modules()
        if _is_linear(module) and id(module) not in halves
    }
    forms = {key: _linear(path, module) for key, (path, module) in weights.items()}
    first = {key: id(_first(module)) for key, (_, module) in weights.items()}
    firsts = {key: k for k, key in enumerate(dict.fromkeys(first.values()))}
    sizes = {id(p): p.numel() for p in model.parameters()}
    owned = [{id(p) for p in block.parameters()} for block in blocks]
    inputs, embedding = _watched(model, [module for _, module in weights.values()], example_inputs)
    config = getattr(model, "config", None)
    heads = next((n for key in _HEADS if (n := getattr(config, key, None))), 0)
    keys = getattr(config, _KEYS, None) or heads
    layers = []
    for block, own in zip(blocks, owned, strict=True):
        inside = [id(m) for m in block.modules() if id(m) in inputs]
        members: dict[int, list[int]] = {}
        for key in sorted(inside, key=lambda key: inputs[key][0]):
            members.setdefault(inputs[key][1], []).append(key)
        groups = _groups(list(members.values()), forms, {k: firsts[first[k]] for k in inside})
        if not groups:
            raise CaptureError(
                "no linear of the block was seen in a forward pass",
                site=name,
                way_out="a model of blocks with linears, or a Workload",
            )
        width = groups[0].inputs
        attention = groups[1].inputs if len(groups) > 1 and groups[1].closes else width
        known = sum(group.parameters for group in groups)
        others = sum(sizes[p] for p in own) - known
        layers.append(Layer(groups, width, heads, keys, attention if heads else 0, others))
    ends = sum(sizes[p] for p in sizes.keys() - set().union(*owned))
    return Workload(tuple(layers), Linear(layers[0].width, embedding), ends)


def _blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The list of blocks that has the most parameters, and its name."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
        if len({type(block) for block in module}) == 1 and not _is_linear(module[0])
    ]
    if not lists:
        raise CaptureError(
            "the model has no list of blocks of one kind",
            way_out="a decoder or encoder with its blocks in an nn.ModuleList; or say its sizes: "
            "tensorize.distributed.Workload.decoder(...)",
        )
    name, found = max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))
    return name, list(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LowRankLinear | FactoredLinear) or is_plain_linear(module, "weight")


def _first(module: nn.Module) -> object:
    """What weights with one first factor have in common."""
    return module.first.weight if isinstance(module, LowRankLinear) else module


def _linear(name: str, module: nn.Module) -> Linear:
    weight: Any = module.weight
    if not isinstance(weight, FactoredWeight):
        rows, columns = weight.shape
        turned = type(module).__name__ == "Conv1D"
        return Linear(rows, columns) if turned else Linear(columns, rows)
    spec = weight.spec
    if not isinstance(module, LowRankLinear) or not isinstance(spec, TTSpec):
        raise CaptureError(
            f"a weight as {spec.format} is not one that several devices can share",
            site=f"{name}.weight",
            way_out='formats="low_rank" without precision=',
        )
    (outputs, inputs), (rank,) = spec.shape, spec.ranks
    return Linear(inputs, outputs, rank, 0, spec.pivoted > 0)


def _groups(
    members: list[list[int]], forms: dict[int, Linear], firsts: dict[int, int]
) -> tuple[Group, ...]:
    """Groups by their inputs, in the order they run: every second one closes what one opened."""
    found = []
    for k, keys in enumerate(members):
        own = {n: j for j, n in enumerate(dict.fromkeys(firsts[key] for key in keys))}
        linears = (
            Linear(f.inputs, f.outputs, f.rank, own[firsts[key]], f.pivoted)
            for key in keys
            for f in (forms[key],)
        )
        found.append(Group(tuple(linears), k % 2 == 1))
    return tuple(found)


def _watched(
    model: nn.Module, weights: list[nn.Module], example_inputs: Any
) -> tuple[dict[int, tuple[int, int]], int]:
    """By each weight's module when it was called and with which input; the size of the vocabulary.

    The vocabulary is what the last axis of the outputs runs over.
    """
    seen: dict[int, tuple[int, int]] = {}
    alive: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        same = next((k for k, x in enumerate(alive) if x is given[0]), len(alive))
        if same == len(alive):
            alive.append(given[0])
        seen.setdefault(id(module), (len(seen), same))

    with keeping(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        as_fake(model, "cpu")
        drop_products(model)  # they ask where tensors lie
        batch = needed(model, example_inputs, "there are no inputs to see its weights in use with")
        hooks = [module.register_forward_pre_hook(note) for module in weights]
        try:
            outputs = model(*batch.args, **batch.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    logits = next(_tensors(outputs), None)
    if logits is None:
        raise CaptureError("the model gives no tensor", way_out="a model with outputs")
    return seen, logits.shape[-1]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    logits = getattr(outputs, "logits", None)
    leaves = [logits] if logits is not None else pytree.tree_leaves(outputs)
    yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))
