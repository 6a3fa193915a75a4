"""A dense model through the backend: compressed as it is traced, to see what that would give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize.api.compile import compiled
from tensorize.api.options import Options
from tensorize.base.dynamo import name_of_parameter, own_graph, parameters_in, why_broken_off
from tensorize.ir.spec import TTSpec
from tensorize.weight.install import factored, install

log = logging.getLogger("tensorize")


Factors = tuple[TTSpec, list[nn.Parameter]]
# Cores by the dense parameter and the options they were made under: recompiles share them.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_told = False


def preview_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    options: Options,
) -> Callable[..., Any]:
    global _told
    weights = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    reason = why_broken_off(graph)
    if reason is not None:
        log.warning(
            "the model breaks into several graphs, and the preview meets the budget within each: "
            "it sees %d weights up to here (%s)",
            len(weights),
            reason,
        )
    if not weights:  # a part of the model that no budget can be met within
        return graph.forward
    if not _told:
        _told = True
        log.warning(
            'backend="tensorize" with a budget previews a compressed model: the dense weights stay '
            "in memory and an optimizer would not see the factors; tensorize.compile(model, "
            "budget) gives the compressed model itself"
        )
    # Layers of equal shapes share one graph when they are compiled one by one.
    at = [k for k, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)]
    made: dict[tuple[int, ...], tuple[list[Any], Callable[..., Any]]] = {}

    def model_of(inputs: Sequence[Any]) -> Callable[..., Any]:
        held = [inputs[k] for k in at]
        key = tuple(map(id, held))
        if key not in made:  # holding them keeps their identities theirs
            made[key] = held, _previewed(graph, inputs, parameters_in(graph, inputs), options)
        return made[key][1]

    model_of(example_inputs)
    return lambda *inputs: model_of(inputs)(*inputs)


def _previewed(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    options: Options,
) -> Callable[..., Any]:
    """The graph with these parameters factorized."""
    copied, kept = _as_module(graph, parameters)
    model = _Preview(copied)
    inputs = tuple(value for value, keep in zip(example_inputs, kept, strict=True) if keep)
    names = {id(p): name for name, p in model.named_parameters()}
    key = repr(options)
    known: dict[str, Factors | None] = {}
    for parameter in parameters.values():
        made = _made.get(parameter) or {}
        if key in made:
            known[names[id(parameter)]] = made[key]
    if len(known) < len(names):
        dense = dict(model.named_parameters())
        compiled(model, replace(options, example_inputs=inputs))
        cores = {name: (w.spec, [*w.cores, *w.indices]) for name, w in factored(model)}
        for name, parameter in dense.items():
            _made[parameter] = {**(_made.get(parameter) or {}), key: cores.get(name)}
        log.info("previewed a graph of %d parameters: %d factorized", len(dense), len(cores))
    else:
        for name, factors in known.items():
            if factors is not None:
                install(model, [name], *factors)

    def run(*arguments: Any) -> Any:
        return model(*(value for value, keep in zip(arguments, kept, strict=True) if keep))

    return run


class _Preview(nn.Module):
    """A graph as a module of its own, whose parameters can be replaced."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Any) -> Any:
        return self.graph(*inputs)


def _as_module(
    graph: fx.GraphModule, parameters: Mapping[str, nn.Parameter]
) -> tuple[fx.GraphModule, list[bool]]:
    """The graph with its parameters as its own, and which of its inputs are left."""
    copied = own_graph(graph)
    copied.weights = held = nn.Module()
    kept: list[bool] = []
    for node in list(copied.graph.nodes):
        if node.op != "placeholder":
            continue
        kept.append(node.name not in parameters)
        if kept[-1]:
            continue
        name = name_of_parameter(node)
        held.register_parameter(name, parameters[node.name])
        with copied.graph.inserting_before(node):
            replacement = copied.graph.get_attr(f"weights.{name}")
        node.replace_all_uses_with(replacement)
        copied.graph.erase_node(node)
    copied.recompile()
    return copied, kept
