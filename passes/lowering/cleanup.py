"""Remove what nothing depends on, what changes nothing, and what was computed already."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from tensorize.base.dynamo import value_of
from tensorize.formats.order import OPERATION
from tensorize.passes.lowering.graph import Lowered, argument, memory_of, written

# Only what is known to change nothing: a graph of torch functions also holds writes into tensors,
# and random draws that the next ones depend on.
_PURE_FUNCTIONS = {
    F.linear,
    F.embedding,
    torch.addmm,
    torch.cat,
    torch.matmul,
    OPERATION,
    operator.getitem,
    operator.add,
    operator.mul,
}
_PURE_METHODS = {
    "contiguous",
    "detach",
    "index_select",
    "permute",
    "reshape",
    "size",
    "t",
    "transpose",
    "unsqueeze",
    "view",
}


@dataclass(frozen=True)
class RemoveDead:
    """The same graph without pure nodes whose results are not used."""

    name: str = "cleanup"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        before = len(graph.nodes)
        graph.eliminate_dead_code(is_impure_node=lambda node: not _is_pure(node))
        return replace(program, summary=f"{before - len(graph.nodes)} dead nodes removed")


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _PURE_FUNCTIONS
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    return node.op == "get_attr"


@dataclass(frozen=True)
class RemoveRepeats:
    """The same graph with everything pure computed once.

    Layers with one first factor ask each for its product with their input. Where gradients are
    asked for torch does the same to the graph that it makes of this one.
    """

    name: str = "repeats"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        # Who is given two results may write to one of them.
        apart = written(graph) | {memory_of(node) for node in graph.output_node().all_input_nodes}
        first: dict[object, fx.Node] = {}
        count = 0
        for node in list(graph.nodes):
            value = value_of(node)
            memories = {memory_of(each) for each in (node, *node.all_input_nodes)}
            if value is None or node.op == "get_attr" or not _is_pure(node) or memories & apart:
                continue
            # The dtype hangs on modes that are entered in between; slices have no hash.
            key = node.target, repr(node.args), repr(node.kwargs), value.dtype
            same = first.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                count += 1
        return replace(program, summary=f"{count} nodes removed that repeated another")


@dataclass(frozen=True)
class RemoveIdentities:
    """The same graph without calls that gave back their own input.

    Dropout of a model in evaluation mode, a cast to the dtype that is there, what is contiguous
    already: other passes then see what follows what.
    """

    name: str = "identities"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        changed = written(graph)  # dynamo does not know that dropout's result is its input
        gone = [n for n in graph.nodes if _gives_back_its_input(n) and memory_of(n) not in changed]
        for node in gone:
            node.replace_all_uses_with(_input(node))
            graph.erase_node(node)
        return replace(program, summary=f"{len(gone)} calls removed that changed nothing")


_MAYBE_IDENTITIES = {"contiguous", "float", "to", "type_as"}


def _gives_back_its_input(node: fx.Node) -> bool:
    """Whether the result is the input's own memory: none of these looks at it in another way."""
    if node.target is F.dropout:
        return argument(node, "training") is False
    if node.target not in _MAYBE_IDENTITIES:
        return False
    result, given = value_of(node), value_of(_input(node))
    same_dtype = result is not None and given is not None and result.dtype == given.dtype
    return same_dtype and memory_of(node) == memory_of(_input(node))


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else argument(node, "input")
