"""Remove what nothing depends on."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx

from tensorize.passes.lowering import Lowered

# Only what is known to change nothing: a graph of torch functions also holds writes into tensors,
# and random draws that the next ones depend on.
_PURE_FUNCTIONS = {
    F.linear,
    F.embedding,
    torch.cat,
    torch.matmul,
    operator.getitem,
    operator.add,
    operator.mul,
}
_PURE_METHODS = {
    "contiguous",
    "detach",
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
