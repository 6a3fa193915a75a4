"""The lowering pipeline: over the FX graph that dynamo hands to the backend.

A pass here takes a ``Lowered`` and gives one: the graph, and the tensors that its placeholders
stand for. ``lower`` runs them in order and keeps what each did.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx

log = logging.getLogger("tensorize")


@dataclass(frozen=True)
class Lowered:
    """A graph at the level of torch functions, and the real parameters behind its placeholders."""

    graph: fx.GraphModule
    parameters: Mapping[str, Tensor]
    summary: str = ""


class LoweringPass(Protocol):
    """One step of the lowering pipeline."""

    @property
    def name(self) -> str: ...

    def run(self, program: Lowered) -> Lowered: ...


def lower(program: Lowered, passes: Sequence[LoweringPass]) -> Lowered:
    """Run ``passes`` in order; each leaves a graph that is well formed."""
    for step in passes:
        program = step.run(program)
        program.graph.graph.lint()
        program.graph.recompile()
        log.info("%s: %s", step.name, program.summary)
    return program


def own_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy to change: dynamo's own graph module is left as it is."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return fx.GraphModule(module, graph)
