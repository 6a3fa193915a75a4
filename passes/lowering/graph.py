"""The lowering pipeline: over the FX graph that dynamo hands to the backend.

A pass here takes a ``Lowered`` and gives one: the graph, and the tensors that its placeholders
stand for. ``lower`` runs them in order and keeps what each did.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from tensorize.base.dynamo import value_of
from tensorize.ir.work import Work

log = logging.getLogger("tensorize")


Pack = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Packed:
    """An input that a graph has beside dynamo's: what ``pack`` makes of those of these names."""

    names: tuple[str, ...]
    pack: Pack


@dataclass(frozen=True)
class Lowered:
    """A graph at the level of torch functions, and the real parameters behind its placeholders.

    ``fused``: the launches that took in what is around their weights, and those weights' cores.
    ``packed``: the inputs that the graph has beside dynamo's, in order
    (``passes/lowering/packed.py``).
    """

    graph: fx.GraphModule
    parameters: Mapping[str, Tensor]
    packed: tuple[Packed, ...] = ()
    fused: tuple[tuple[Work, tuple[Tensor, ...]], ...] = ()
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


# ------------------------------------------------------------------------ what a graph writes to


def memory_of(node: Any) -> int | None:
    """What a result has in common with its views."""
    value = value_of(node)
    return None if value is None else value.untyped_storage()._cdata


def written(graph: fx.Graph) -> set[int]:
    """The memory that some node writes to: its readers do not all see the same values."""
    targets = (target for node in graph.nodes for target in _targets(node))
    return {memory for target in targets if (memory := memory_of(target)) is not None}


_ASSIGNING = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv")),
    *(getattr(operator, f"i{name}") for name in ("and", "or", "xor", "pow", "mod", "matmul")),
}


def _targets(node: fx.Node) -> Iterator[Any]:
    """The nodes whose memory a node writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for taken, value in zip(schema.arguments, node.args, strict=False):
            if taken.alias_info is not None and taken.alias_info.is_write:
                yield from value if isinstance(value, list | tuple) else (value,)
        return
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    trailing = name.endswith("_") and not name.endswith("__")
    if node.args and (trailing or node.target in _ASSIGNING or argument(node, "inplace") is True):
        yield node.args[0]


def argument(node: fx.Node, name: str) -> Any:
    """What a function was given for one of its parameters, None where it has no such one."""
    if name in node.kwargs or not inspect.isfunction(node.target):
        return node.kwargs.get(name)
    names = list(inspect.signature(node.target).parameters)
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else None
