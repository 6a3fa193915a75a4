"""Small compressed models, their graphs as the backend lowers them, and the calls in those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import tensorize
from tensorize.base.dynamo import own_graph
from tensorize.passes.lowering.graph import Lowered, lower
from tensorize.passes.lowering.packed import with_packed


class Attention(nn.Module):
    """Projections of one input, as q, k, v have them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x) + self.v(x))


def compressed(width: int = 32, rank: int = 4) -> nn.Module:
    small = tensorize.compile(Attention(width), None, ranks={"*": rank}, example_inputs=(X,))
    return tensorize.weight.plain(small).eval()  # two linears a weight, and nothing between


X = torch.randn(1, 1, 32)
EAGER = {"inner": "eager"}


def lowered_and_run(
    model: nn.Module, x: Tensor | tuple[Tensor, ...], *passes: Any
) -> tuple[Lowered, Any]:
    """What passes make of the graph that dynamo hands a backend, and what it computes then."""
    seen: list[Lowered] = []

    def through_passes(graph: fx.GraphModule, inputs: list) -> object:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        named = zip(nodes, inputs, strict=True)
        parameters = {n.name: v for n, v in named if isinstance(v, nn.Parameter)}
        seen.append(lower(Lowered(own_graph(graph), parameters), passes))
        return with_packed(seen[0].graph.forward, seen[0], [node.name for node in nodes])

    with torch.no_grad():
        given = x if isinstance(x, tuple) else (x,)
        result = torch.compile(model, backend=through_passes)(*given)
    return seen[0], result


def traced(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> Lowered:
    """The graph that dynamo hands a backend, and the parameters behind its placeholders."""
    return lowered_and_run(model, x)[0]


def calls(graph: fx.GraphModule) -> list[str]:
    """What a graph computes, a word a node."""
    words = []
    for node in graph.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            words.append(node.target if isinstance(node.target, str) else node.target.__name__)
    return words
