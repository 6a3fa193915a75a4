"""Compute hidden units in the order that a weight without an identity reads them in.

Such a weight puts its input's columns in an order (``algebra/pivot.py``), which costs a pass over
them. Where they come from linears through elementwise functions alone, and nothing else reads them,
as in an MLP, those linears compute them in that order at once: by copies of their weights with rows
in it. An MLP in bfloat16 is 1.03 to 1.06 times as fast by it at 256 rows, and 1.04 to 1.11 times at
2048 (one thread of Zen 5; widths of 768 and 2048, gated or not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tensorize.base.dynamo import value_of
from tensorize.formats.order import OPERATION, columns
from tensorize.passes.lowering.graph import Lowered, Packed, memory_of, written
from tensorize.passes.lowering.group import arguments_of, is_linear
from tensorize.passes.lowering.norms import PLUS, TIMES
from tensorize.passes.lowering.packed import add_packed

_ELEMENTWISE = {
    *PLUS,
    *TIMES,
    *(F.gelu, F.relu, F.silu, torch.pow, torch.relu, torch.sigmoid, torch.tanh),
    *("pow", "relu", "sigmoid", "tanh"),
}


@dataclass(frozen=True)
class ComputeInOrder:
    """Lowered without orders of what linears in half precision can compute in them.

    In float32, where products take three times as long, there is next to nothing to gain. The graph
    must need no gradients: the copies would get them.
    """

    name: str = "orders"

    def run(self, program: Lowered) -> Lowered:
        graph, count = program.graph.graph, 0
        changed = written(graph)
        for node in list(graph.nodes):
            if node.target is not OPERATION:
                continue
            linears = _linears_behind(node, program, changed)
            for linear in linears:
                program = _compute_in_order(program, linear, node.args[1])
            if linears:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                count += 1
        return replace(program, summary=f"{count} orders that linears compute in")


def rows_in_order(weight_and_order: Sequence[Tensor]) -> Tensor:
    """A weight (out, in), or a bias (out,), with its first axis in an order."""
    weight, order = weight_and_order
    return weight.index_select(0, columns(order, len(weight)))


def _linears_behind(node: fx.Node, program: Lowered, changed: set[int]) -> list[fx.Node]:
    """The linears that what is put in an order comes from; none where it is not from such alone."""
    x, order = node.args
    value = value_of(x)
    if value is None or value.dtype.itemsize != 2 or order.op != "placeholder":
        return []
    inside, waiting, linears = {node}, [x], []
    while waiting:
        each = waiting.pop()
        if each in inside:
            continue
        inside.add(each)
        if is_linear(each, program.parameters):
            linears.append(each)
        elif each.target in _ELEMENTWISE and _of_one_shape(each, value):
            waiting += each.all_input_nodes
        else:
            return []
    behind = inside - {node}
    alone = all(inside.issuperset(each.users) for each in behind)
    return linears if alone and not any(memory_of(each) in changed for each in behind) else []


def _of_one_shape(node: fx.Node, value: Tensor) -> bool:
    """Whether all tensors that a function takes are as large as what it gives."""
    taken = [value_of(each) for each in node.all_input_nodes]
    return all(each is not None and each.shape == value.shape for each in taken)


def _compute_in_order(program: Lowered, linear: fx.Node, order: fx.Node) -> Lowered:
    for held in arguments_of(linear):
        if held is not None:
            packed = Packed((held.name, order.name), rows_in_order)
            program, copy = add_packed(program, f"{held.name}_in_order", packed)
            linear.replace_input_with(held, copy)
    return program
