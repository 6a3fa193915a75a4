"""Group projections of one input: q, k, v and gate, up become one contraction.

Several linears of the same x are one matmul against their weights side by side. Where each result
goes into one further linear only, as the two factors of a low-rank weight do, and those have equal
shapes, the second linears are one batched matmul too: 2 calls instead of 6 for q, k, v.

It pays for one row, where calls and the first touch of a weight are what costs; from a few rows on
it gains nothing on a CPU. ``benchmarks/group.py`` measures it.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tensorize.base.dynamo import value_of
from tensorize.base.tensors import is_plain
from tensorize.passes.lowering.graph import Lowered, Packed, memory_of, written
from tensorize.passes.lowering.packed import add_packed


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out_k, in) as one (in, sum of out_k)."""
    return torch.cat(list(weights)).t().contiguous()


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out, in) as a stack (linears, in, out)."""
    return torch.stack([weight.t() for weight in weights])


@dataclass(frozen=True)
class Biases:
    """The biases that there are, with zeros (of these sizes) for the others: (sum of sizes,).

    ``stack``: (linears, 1, size).
    """

    sizes: tuple[int, ...]
    given: tuple[bool, ...]
    stack: bool

    def __call__(self, biases: Sequence[Tensor]) -> Tensor:
        there = iter(biases)
        zeros = biases[0].new_zeros
        pairs = zip(self.sizes, self.given, strict=True)
        all_biases = [next(there) if given else zeros(size) for size, given in pairs]
        return torch.stack(all_biases).unsqueeze(1) if self.stack else torch.cat(all_biases)


# ---------------------------------------------------------------------------------------- the pass


@dataclass(frozen=True)
class GroupProjections:
    """Lowered with linears of one input grouped, where x has at most ``most_rows`` rows."""

    most_rows: int = 1
    name: str = "group"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if not is_linear(node, program.parameters):
                continue
            rows = rows_of(node.args[0])
            if rows is not None and rows <= self.most_rows:
                by_input[node.args[0]].append(node)
        count, changed = 0, written(graph)
        for x, linears in by_input.items():
            if len(linears) < 2 or memory_of(x) in changed:
                continue
            for group in _by_shape(linears, program.parameters):
                if len(group) > 1:
                    program = _replace(program, x, group, f"grouped_{count}")
                    count += 1
        return replace(program, summary=f"{count} groups of projections")


def is_linear(node: fx.Node, parameters: Mapping[str, Tensor]) -> bool:
    """A linear of a computed x against an ordinary parameter, and such a one or no bias."""
    if node.op != "call_function" or node.target is not F.linear or not node.args:
        return False
    weight, bias = arguments_of(node)
    if not isinstance(node.args[0], fx.Node):
        return False
    held = [weight] if bias is None else [weight, bias]
    if not all(isinstance(a, fx.Node) and a.name in parameters for a in held):
        return False
    matrix = parameters[weight.name].dim() == 2  # a vector is allowed as well
    return matrix and all(is_plain(parameters[a.name]) for a in held)


def arguments_of(node: fx.Node) -> tuple[Any, Any]:
    """The weight and the bias that a linear is given."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return weight, bias


def rows_of(x: object) -> int | None:
    """How many rows a linear's input has; None where that is not known when a graph is compiled."""
    value = value_of(x)
    if value is None or value.dim() < 1:
        return None
    sizes = value.shape[:-1]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _next_linear(node: fx.Node, parameters: Mapping[str, Tensor]) -> fx.Node | None:
    """The only use of a result, if that is another linear."""
    users = list(node.users)
    if len(users) != 1 or not is_linear(users[0], parameters) or users[0].args[0] is not node:
        return None
    return users[0]


def _by_shape(linears: Sequence[fx.Node], parameters: Mapping[str, Tensor]) -> list[list[fx.Node]]:
    """Linears whose next ones have equal shapes together, all others in one group."""
    groups: dict[object, list[fx.Node]] = defaultdict(list)
    for node in linears:
        following = _next_linear(node, parameters)
        shape: object = None
        if following is not None:
            shape = tuple(_weight(following, parameters).shape)
        groups[shape].append(node)
    lonely = [g for shape, group in groups.items() if len(group) == 1 for g in group if shape]
    for node in lonely:
        groups[None].append(node)
    return [g for shape, g in groups.items() if shape is None or len(g) > 1]


def _weight(node: fx.Node, parameters: Mapping[str, Tensor]) -> Tensor:
    return parameters[arguments_of(node)[0].name]


def _replace(program: Lowered, x: fx.Node, group: Sequence[fx.Node], name: str) -> Lowered:
    """The program with one product in place of the group (and one of the linears after it)."""
    parameters, graph = program.parameters, program.graph.graph
    following = [node for node in (_next_linear(n, parameters) for n in group) if node is not None]
    shapes = {tuple(_weight(node, parameters).shape) for node in following}
    whole = len(following) == len(group) and len(shapes) == 1
    results = following if whole else list(group)
    widths = [len(_weight(node, parameters)) for node in results]
    value = value_of(x)
    assert value is not None
    lead = value.shape[:-1]
    with graph.inserting_before(group[0]):
        y = graph.call_method("reshape", (x, -1, value.shape[-1]))
        if whole:
            y = graph.call_method("expand", (y, len(group), -1, -1))  # (linears, rows, in)
    for part, linears in (("first", group), ("second", following if whole else [])):
        if linears:
            program, y = _product(program, y, linears, f"{name}_{part}", stack=whole)
    with graph.inserting_before(group[0]):
        split = ("unbind", (y,)) if whole else ("split", (y, widths, -1))
        parts = graph.call_method(*split)
        for k, (node, width) in enumerate(zip(results, widths, strict=True)):
            part = graph.call_function(operator.getitem, (parts, k))
            result = graph.call_method("reshape", (part, *lead, width))
            result.meta.update(node.meta)
            node.replace_all_uses_with(result)
    for node in [*(following if whole else []), *group]:
        graph.erase_node(node)
    return program


def _product(
    program: Lowered, x: fx.Node, linears: Sequence[fx.Node], name: str, *, stack: bool
) -> tuple[Lowered, fx.Node]:
    """Linears of x (rows, in) as one product, of x (linears, rows, in) as one batched product."""
    pairs = [arguments_of(node) for node in linears]
    weights = tuple(weight.name for weight, _ in pairs)
    biases = tuple(bias.name for _, bias in pairs if bias is not None)
    packed = Packed(weights, stacked if stack else joined)
    program, weight = add_packed(program, f"{name}_weights", packed)
    graph = program.graph.graph
    if not biases:
        with graph.inserting_after(x):
            return program, graph.call_function(torch.bmm if stack else torch.mm, (x, weight))
    sizes = tuple(len(program.parameters[weight]) for weight in weights)
    every = Biases(sizes, tuple(bias is not None for _, bias in pairs), stack)
    program, bias = add_packed(program, f"{name}_biases", Packed(biases, every))
    with graph.inserting_after(x):
        product = torch.baddbmm if stack else torch.addmm
        return program, graph.call_function(product, (bias, x, weight))
