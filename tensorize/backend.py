"""``torch.compile(model, backend="tensorize", options={...})``.

On a model that ``tensorize.compile`` rewrote, the backend lowers it: kernels take in the norms and
the elementwise work around their weights; every product on a CPU is computed in the way that is
fastest for its rows; and the rest goes to inductor (``options={"inner": "eager"}``:
it runs as it is, projections of one token grouped; that compiles in a fraction of the time).

On a dense model it is a preview for inference: the linears of the graph are factorized within
``options["budget"]`` by the same analysis as ``tensorize.compile``. A backend cannot free the dense
weights, and the caller's optimizer does not see the factors, so they stay, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize import api
from tensorize.errors import TensorizeError
from tensorize.ir import TTSpec
from tensorize.passes.cleanup import RemoveDead, RemoveIdentities
from tensorize.passes.fuse import FuseKernels, Kernels
from tensorize.passes.group import GroupProjections
from tensorize.passes.lowering import Lowered, LoweringPass, lower, own_graph
from tensorize.passes.packed import value, with_packed
from tensorize.passes.products import ChooseProducts
from tensorize.report import note_fused
from tensorize.runtime import launches
from tensorize.weight import LowRankLinear, factored, install

log = logging.getLogger("tensorize")

INNER = ("auto", "eager", "inductor")
# Rows up to which projections are grouped: measured on a CPU (passes/group.py); on a GPU launches
# are what a few rows cost.
_GROUPED_ROWS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class BackendOptions:
    """What ``options=`` may hold.

    ``budget``, ``formats``, ``ranks`` and ``seed`` are those of ``tensorize.compile`` and serve
    the preview of a dense model. ``inner`` runs what is left: ``"auto"``, ``"eager"`` or
    ``"inductor"``.
    """

    budget: Any = None
    formats: Any = None
    ranks: Any = None
    seed: int = 0
    inner: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Raises TensorizeError for an option that is unknown."""
        options = dict(options or {})
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise TensorizeError(
                    f"options[{name!r}] is not one of {', '.join(sorted(known))}",
                    way_out='options={"budget": 0.25}',
                )
        found = cls(**options)
        if found.inner not in INNER:
            raise TensorizeError(
                f"options['inner']={found.inner!r} is not one of {', '.join(INNER)}",
                way_out='options={"inner": "auto"}',
            )
        return found


def tensorize(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """The backend: called by dynamo for every graph; the entry point ``torch_dynamo_backends``."""
    chosen = BackendOptions.of(options)
    parameters = _parameters(graph, example_inputs)
    if (chosen.budget is None and chosen.ranks is None) or _is_rewritten(graph):
        if chosen.budget is not None:
            log.warning("the model is compressed already: the backend's budget is not used")
        return _lowered(graph, example_inputs, parameters, chosen)
    return _preview(graph, example_inputs, parameters, chosen)


def _parameters(graph: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, nn.Parameter]:
    """The parameters behind a graph's placeholders, by the names of those."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return {
        node.name: value
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }


def _is_rewritten(graph: fx.GraphModule) -> bool:
    """Whether the graph comes from modules that ``tensorize.compile`` rewrote."""
    for node in graph.graph.nodes:
        for _, kind in node.meta.get("nn_module_stack", {}).values():
            if kind is LowRankLinear or getattr(kind, "_factored_parameters", ()):
                return True
    return False


# ---------------------------------------------------------------------------------- lowering


def _lowered(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, Tensor],
    options: BackendOptions,
) -> Callable[..., Any]:
    device = next((p.device.type for p in parameters.values()), "cpu")
    inner = _best_inner(device) if options.inner == "auto" else options.inner
    lowered = fuse(graph, example_inputs, launches())
    for work, cores in lowered.fused:
        for core in cores:
            note_fused(core, work.fused)
    gradients = _has_gradients(example_inputs)
    passes: list[LoweringPass] = []
    if not gradients and inner == "eager":  # packed copies of the weights would get none
        passes.append(GroupProjections(_GROUPED_ROWS.get(device, 1)))
    if device == "cpu":
        passes.append(ChooseProducts(gradients))
    lowered = lower(lowered, [*passes, RemoveDead()])
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    if inner == "eager":
        return with_packed(lowered.graph.forward, lowered, names)
    from torch._inductor.compile_fx import compile_fx

    packed = [value(p.pack, [parameters[name] for name in p.names]) for p in lowered.packed]
    compiled = compile_fx(lowered.graph, [*example_inputs, *map(_of_fixed_shape, packed)])
    return with_packed(cast(Callable[..., Any], compiled), lowered, names)


def _of_fixed_shape(tensor: Tensor) -> Tensor:
    """A further input as inductor is to see it: its sizes are no symbols, which have no source."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def _best_inner(device: str) -> str:
    """Inductor; on a CPU it needs a C++ compiler."""
    if device != "cpu":
        return "inductor"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        log.warning(
            "there is no C++ compiler, so the rest of the graph runs as it is: install one, name "
            'one in CXX, or pass options={"inner": "eager"}'
        )
        return "eager"
    return "inductor"


def fuse(graph: fx.GraphModule, example_inputs: Sequence[Any], kernels: Kernels) -> Lowered:
    """A copy of a graph, whose kernels take in what is around their weights.

    Nothing is changed where the model does not run by kernels, or where there are gradients.
    """
    program = Lowered(own_graph(graph), _parameters(graph, example_inputs))
    by_kernels = any(node.target is kernels.contract for node in graph.graph.nodes)
    if not by_kernels or _has_gradients(example_inputs):
        return program
    return lower(program, (RemoveIdentities(), FuseKernels(kernels), RemoveDead()))


def _has_gradients(inputs: Sequence[Any]) -> bool:
    """Whether anything that goes in, a parameter or not, may be asked for its gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    )


# ----------------------------------------------------------------------------------- preview

Factors = tuple[TTSpec, list[nn.Parameter]]
# Cores by the dense parameter and the options they were made under: recompiles share them.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_told = False


def _preview(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    options: BackendOptions,
) -> Callable[..., Any]:
    global _told
    weights = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    reason: Any = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        log.warning(
            "the model breaks into several graphs, and the preview meets the budget within each: "
            "it sees %d weights up to here (%s)",
            len(weights),
            reason.reason.partition("\n")[0],
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
            made[key] = held, _previewed(graph, inputs, _parameters(graph, inputs), options)
        return made[key][1]

    model_of(example_inputs)
    return lambda *inputs: model_of(inputs)(*inputs)


def _previewed(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    options: BackendOptions,
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
        api.compile(
            model,
            options.budget,
            inplace=True,
            progress=False,
            example_inputs=inputs,
            metric="frobenius",
            formats=options.formats,
            ranks=options.ranks,
            seed=options.seed,
        )
        cores = {name: (w.spec, list(w.cores)) for name, w in factored(model)}
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
    kept: list[bool] = []
    for node in list(copied.graph.nodes):
        if node.op != "placeholder":
            continue
        kept.append(node.name not in parameters)
        if kept[-1]:
            continue
        path, _, leaf = _qualified_name(node).rpartition(".")
        owner = copied
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, parameters[node.name])
        with copied.graph.inserting_before(node):
            replacement = copied.graph.get_attr(f"{path}.{leaf}" if path else leaf)
        node.replace_all_uses_with(replacement)
        copied.graph.erase_node(node)
    copied.recompile()
    return copied, kept


def _qualified_name(node: fx.Node) -> str:
    """A name for a parameter's placeholder that is a path: dynamo's own, made plain."""
    return "weights." + node.name.strip("_").removeprefix("l_self_").rstrip("_")
