"""Copies of weights for inference, laid out anew: further inputs of a lowered graph.

A graph of dynamo's is not one model's own: layers of equal shapes share it when they are compiled
one by one, and a parameter may be replaced by another. So what a pass packs is not kept in the
graph but found at every call, by the very tensors that the graph is called with, and made again
where one of them was changed (``weight/made.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from tensorize.passes.lowering.graph import Lowered, Packed
from tensorize.weight.made import made_of


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
        return run(*given, *[made_of(pack, [given[k] for k in at]) for pack, at in wanted])

    return run_packed
