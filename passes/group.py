"""Group projections of one input: q, k, v and gate, up become one contraction.

Several linears of the same x are one matmul against their weights side by side. Where each result
goes into one further linear only, as the two factors of a low-rank weight do, and those have equal
shapes, the second linears are one batched matmul too: 2 calls instead of 6 for q, k, v.

It pays for one row, where calls and the first touch of a weight are what costs; from a few rows on
it gains nothing on a CPU. ``benchmarks/group.py`` measures it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tensorize.passes.lowering import Lowered, memory_of, value_of, written


class GroupedLinears(nn.Module):
    """y_k = x A_kᵀ + a_k for all k at once, and where there are B_k, y_k B_kᵀ + b_k.

    Packs copies of the weights, and packs them again when a weight was changed in place (by an
    optimizer, by ``load_state_dict``).
    """

    def __init__(
        self,
        first: Sequence[tuple[Tensor, Tensor | None]],
        second: Sequence[tuple[Tensor, Tensor | None]] = (),
    ) -> None:
        super().__init__()
        self._first, self._second = list(first), list(second)
        self._sources = [t for pair in (*first, *second) for t in pair if t is not None]
        self._widths = [weight.shape[0] for weight, _ in first]
        self._versions: list[int] | None = None

    @torch.no_grad()
    def _pack(self) -> None:
        if self._second:
            self._packed = [_Batch.of(self._first), _Batch.of(self._second)]
        else:
            self._weight = torch.cat([weight for weight, _ in self._first]).t().contiguous()
            self._bias = _joined(self._first)
        self._versions = [source._version for source in self._sources]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._versions != [source._version for source in self._sources]:
            self._pack()
        lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if self._second:
            first, second = self._packed
            y = second(first(rows.expand(len(self._second), -1, -1)))
            return y.view(-1, *lead, y.shape[-1]).unbind()
        y = torch.mm(rows, self._weight)
        y = y if self._bias is None else y.add_(self._bias)
        return y.view(*lead, y.shape[-1]).split(self._widths, -1)


@dataclass(frozen=True)
class _Batch:
    """Linears of equal shapes as one batched matmul: weights (linears, in, out)."""

    weights: Tensor
    biases: Tensor | None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> _Batch:
        bias = _joined(pairs)
        return cls(
            torch.stack([weight.t() for weight, _ in pairs]),
            None if bias is None else bias.view(len(pairs), 1, -1),
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.biases is None:
            return torch.bmm(x, self.weights)
        return torch.baddbmm(self.biases, x, self.weights)


def _joined(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The biases side by side, zeros where there is none; None where none has one."""
    if all(bias is None for _, bias in pairs):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])


@dataclass(frozen=True)
class GroupProjections:
    """Lowered with linears of one input grouped, where x has at most ``most_rows`` rows."""

    most_rows: int = 1
    name: str = "group"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if _is_linear(node, program.parameters) and _few_rows(node.args[0], self.most_rows):
                by_input[node.args[0]].append(node)
        count, changed = 0, written(graph)
        for x, linears in by_input.items():
            if len(linears) < 2 or memory_of(x) in changed:
                continue
            for group in _by_shape(linears, program.parameters):
                if len(group) > 1:
                    _replace(program, x, group, f"_grouped_{count}")
                    count += 1
        return replace(program, summary=f"{count} groups of projections")


def _is_linear(node: fx.Node, parameters: Mapping[str, Tensor]) -> bool:
    """A linear of a computed x against a parameter, and a parameter or nothing as its bias."""
    if node.op != "call_function" or node.target is not F.linear or not node.args:
        return False
    arguments = _arguments(node)
    if arguments is None or not isinstance(node.args[0], fx.Node):
        return False
    return all(a is None or a.name in parameters for a in arguments)


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """Weight and bias nodes."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(weight, fx.Node) or not (bias is None or isinstance(bias, fx.Node)):
        return None
    return weight, bias


def _few_rows(x: object, most: int) -> bool:
    value = value_of(x)
    if value is None or value.dim() < 1:
        return False
    rows = 1
    for size in value.shape[:-1]:
        if not isinstance(size, int):
            return False  # not known when the graph is compiled
        rows *= size
    return rows <= most


def _next_linear(node: fx.Node, parameters: Mapping[str, Tensor]) -> fx.Node | None:
    """The only use of a result, if that is another linear."""
    users = list(node.users)
    if len(users) != 1 or not _is_linear(users[0], parameters) or users[0].args[0] is not node:
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
    arguments = _arguments(node)
    assert arguments is not None
    return parameters[arguments[0].name]


def _pair(node: fx.Node, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    arguments = _arguments(node)
    assert arguments is not None
    weight, bias = arguments
    return parameters[weight.name], None if bias is None else parameters[bias.name]


def _replace(program: Lowered, x: fx.Node, group: Sequence[fx.Node], name: str) -> None:
    """Put one module call in place of the group (and of the linears after it)."""
    parameters, graph = program.parameters, program.graph.graph
    following = [_next_linear(node, parameters) for node in group]
    together = [node for node in following if node is not None]
    shapes = {tuple(_weight(node, parameters).shape) for node in together}
    whole = len(together) == len(group) and len(shapes) == 1
    first = [_pair(node, parameters) for node in group]
    second = [_pair(node, parameters) for node in together] if whole else []
    program.graph.add_submodule(name, GroupedLinears(first, second))
    with graph.inserting_before(group[0]):
        call = graph.call_module(name, (x,))
        for k, node in enumerate(together if whole else group):
            part = graph.call_function(_item, (call, k))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in [*(together if whole else []), *group]:
        graph.erase_node(node)


def _item(parts: tuple[Tensor, ...], k: int) -> Tensor:
    return parts[k]
