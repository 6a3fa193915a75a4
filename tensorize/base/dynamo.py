"""What torch's compiler is asked and told beyond what it promises.

Dynamo traces a model to graphs, and inductor compiles them. Nothing here is public in torch: it is
known to hold in the versions ``KNOWN``, and ``tests/base/test_dynamo.py`` asks each question of the
torch that is installed.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tensorize.base import hooks

KNOWN = ("2.11", "2.13")

_TRACER = "torch._dynamo.convert_frame"
"""What dynamo imports before it traces anything."""

# ------------------------------------------------------------------- what it is told of functions


def answer_private_functions(*names: str) -> None:
    """Let ``__torch_function__`` answer these functions of ``torch`` in graphs as it does outside.

    Dynamo has it that what stands in for a tensor can answer no private function.
    """

    def teach() -> None:
        from torch._dynamo.variables.torch import get_overridable_functions

        get_overridable_functions().update(getattr(torch, name) for name in names)

    hooks.when_imported(_TRACER, teach)


def answer_matmul_from_the_left() -> None:
    """Let ``W @ x`` be that where W stands in for a tensor.

    Dynamo knows no reverse of ``@`` and takes it for ``x @ W``.
    """

    def teach() -> None:
        from torch._dynamo.variables.builtin import BUILTIN_TO_TENSOR_RFN_MAP

        BUILTIN_TO_TENSOR_RFN_MAP[operator.matmul] = torch.Tensor.__rmatmul__

    hooks.when_imported(_TRACER, teach)


# --------------------------------------------------------------------------- what it leaves alone

_WRAPPING = "torch._dynamo.eval_frame"
"""Where the class of what ``torch.compile`` makes of a module is."""


def compiled_from(model: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` was given for this one; None for any other."""
    dynamo: Any = sys.modules.get(_WRAPPING)
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return None
    return cast(nn.Module, model._orig_mod)


_eager = threading.Lock()
_uses_of_eager = 0
_stance = contextlib.ExitStack()


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Parts that ``torch.compile`` made run as they were in here: what watches them is not traced.

    What is compiled has one state for the whole process, so the last thread to leave puts it back.
    """
    global _uses_of_eager
    if _WRAPPING not in sys.modules:  # then nothing is compiled
        yield
        return
    with _eager:
        _uses_of_eager += 1
        if _uses_of_eager == 1:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager:
            _uses_of_eager -= 1
            if _uses_of_eager == 0:
                _stance.close()


# ---------------------------------------------------------------------- what it made of functions


def what_was_compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that ``torch.compile`` or ``torch.compiler.disable`` wrapped; None: it is none.

    A wrapper around such a one has its attributes, but another id.
    """
    wrapped = getattr(function, "_torchdynamo_orig_callable", None)
    return wrapped if getattr(function, "_torchdynamo_wrapper_id", None) == id(function) else None


def compiled_again(function: Any, other: Callable[..., Any]) -> Callable[..., Any]:
    """``other`` wrapped in the way in which ``function`` was, with backend and options."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    return cells["self"].cell_contents(other)


# ------------------------------------------------------------------------ what it says of a graph


def own_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy to change: dynamo's own graph module is left as it is, and knows where its inputs are
    from, which others do not have."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return fx.GraphModule(module, graph)


VALUE = "example_value"
"""What dynamo calls a node's result in ``node.meta``."""


def value_of(node: Any) -> Tensor | None:
    """What dynamo knows of a node's result, where that is a tensor."""
    value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def parameters_in(graph: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, nn.Parameter]:
    """The parameters behind a graph's placeholders, by the names of those."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return {
        node.name: value
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }


def name_of_parameter(placeholder: fx.Node) -> str:
    """A name for a parameter's placeholder that is an identifier: dynamo's own, made plain."""
    return placeholder.name.strip("_").removeprefix("l_self_").rstrip("_")


def kinds_of_modules(graph: fx.GraphModule) -> Iterator[type]:
    """The classes of the modules that a graph's nodes come from, one for every node and module."""
    for node in graph.graph.nodes:
        for _, kind in node.meta.get("nn_module_stack", {}).values():
            yield kind


def why_broken_off(graph: fx.GraphModule) -> str | None:
    """Why a graph ends before the function does, in a line; None where it does not."""
    reason: Any = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return reason.reason.partition("\n")[0]


# -------------------------------------------------------------------------------------- inductor


def compile_by_inductor(
    graph: fx.GraphModule, inputs: Sequence[Any], more: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """What inductor makes of a graph of dynamo's, in a backend's call.

    Args:
        graph: one of our own, that takes what dynamo's does, and then ``more``.
        inputs: those that dynamo gave.
        more: further ones, whose sizes are never to be symbols: nothing says what those are.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph, [*inputs, *map(_of_fixed_shape, more)])
    return cast(Callable[..., Any], compiled)


def _of_fixed_shape(tensor: Tensor) -> Tensor:
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def inductor_finds_a_compiler() -> bool:
    """Whether there is the C++ compiler that inductor needs on a CPU."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True
