"""Copies of weights for inference, laid out anew: further inputs of a lowered graph.

A graph of dynamo's is not one model's own: layers of equal shapes share it when they are compiled
one by one, and a parameter may be replaced by another. So what a pass packs is not kept in the
graph but found at every call, by the very tensors that the graph is called with, and made again
where one of them was changed. Writes are those that torch counts: one through ``.data`` is not
seen, as autograd does not see it either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from tensorize.passes.lowering.graph import Lowered, Pack, Packed


def add_packed(program: Lowered, name: str, packed: Packed) -> tuple[Lowered, fx.Node]:
    """The program with this input, and its placeholder: the one that it has where there is one."""
    graph = program.graph.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if packed in program.packed:
        own = placeholders[-len(program.packed) :]
        return program, own[program.packed.index(packed)]
    with graph.inserting_after(placeholders[-1]):
        placeholder = graph.placeholder(name)
    return replace(program, packed=(*program.packed, packed)), placeholder


def with_packed(
    run: Callable[..., Any], program: Lowered, inputs: Sequence[str]
) -> Callable[..., Any]:
    """``run`` of dynamo's inputs alone, which have these names."""
    if not program.packed:
        return run
    place = {name: k for k, name in enumerate(inputs)}
    wanted = [(p.pack, [place[name] for name in p.names]) for p in program.packed]

    def run_packed(*given: Any) -> Any:
        return run(*given, *[value(pack, [given[k] for k in at]) for pack, at in wanted])

    return run_packed


# By the first of the tensors: how the others and their values were, and what was made of them.
_Made = tuple[list[TensorWeakRef], list[tuple[int, int]], Tensor]
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def value(pack: Pack, tensors: Sequence[Tensor]) -> Tensor:
    """What ``pack`` makes of tensors as they are now; kept as long as the first of them is."""
    known: dict[Any, _Made] = _made.setdefault(tensors[0], {})
    key = pack, tuple(map(id, tensors))
    state = [(_version(tensor), tensor.data_ptr()) for tensor in tensors]
    if key in known:
        references, before, result = known[key]
        same = (ref() is tensor for ref, tensor in zip(references, tensors, strict=True))
        if before == state and all(same):
            return result
    with torch.no_grad():
        result = pack([tensor.detach() for tensor in tensors])
    known[key] = [TensorWeakRef(tensor) for tensor in tensors], state, result
    return result


def _version(tensor: Tensor) -> int:
    """The number of writes to a tensor; what inference mode made does not count them."""
    return -1 if tensor.is_inference() else tensor._version
