"""What ``tensorize.base.dynamo`` knows of torch's compiler, asked of the torch that is installed.

A test that fails here says which question torch now answers in another way: that is to be mended in
``tensorize/base/dynamo.py``, and the version added to ``KNOWN``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from tensorize.base import dynamo

INSTALLED = ".".join(re.findall(r"\d+", torch.__version__)[:2])
X, W = torch.randn(3, 3), torch.randn(3, 3)

Answer = tuple[object, object]
"""What torch gives, and what it is known to give."""


class StandsIn:
    """No tensor: answers functions of torch by a dense one."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.dense if isinstance(value, StandsIn) else value

        args, keywords = pytree.tree_map(plain, (args, kwargs or {}))
        return func(*args, **keywords)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self)  # type: ignore[arg-type]


class Layer(nn.Linear):
    """A class of our own."""


class Model(nn.Module):
    """A module in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def compiled(function: Callable[..., Any], *inputs: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(*inputs)


def graphs(function: Callable[..., Any], *inputs: Any) -> list[tuple[fx.GraphModule, list[Any]]]:
    """What dynamo hands to a backend."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(graph: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        found.append((graph, given))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*inputs)
    return found


def is_a_private_function_answered_by_what_stands_in_for_a_tensor() -> Answer:
    names = ("_weight_norm", "_grouped_mm")
    dynamo.answer_private_functions(*names)
    given: tuple[tuple[Any, ...], ...] = (
        (StandsIn(W), X[:, :1]),
        (X.bfloat16().repeat(1, 8), StandsIn(W.bfloat16().repeat(8, 8)[None])),
    )
    same = {}
    for name, inputs in zip(names, given, strict=True):
        function = getattr(torch, name)
        more = {"offs": torch.tensor([3], dtype=torch.int32)} if name == "_grouped_mm" else {}

        def call(*inputs: Any, function: Any = function, more: Any = more) -> Tensor:
            return function(*inputs, **more)

        same[name] = torch.equal(compiled(call, *inputs), call(*inputs))
    return same, dict.fromkeys(names, True)


def is_matmul_from_the_left_that_from_the_left() -> Answer:
    dynamo.answer_matmul_from_the_left()
    left = compiled(lambda w, x: w @ x, StandsIn(W), X)
    right = compiled(lambda w, x: x @ w, StandsIn(W), X)
    return (torch.allclose(left, W @ X), torch.allclose(right, X @ W)), (True, True)


def has_every_node_the_tensor_that_it_gives() -> Answer:
    [(graph, _)] = graphs(lambda x: x.t() + 1, X[:2])
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    shapes = [tuple(value.shape) for node in calls if (value := dynamo.value_of(node)) is not None]
    return shapes, [(3, 2), (3, 2)]


def are_parameters_inputs_of_a_graph_and_named_by_their_path() -> Answer:
    model = Model()
    [(graph, inputs)] = graphs(model, X)
    found = dynamo.parameters_in(graph, inputs)
    placeholders = {node.name: node for node in graph.graph.nodes if node.op == "placeholder"}
    named = {dynamo.name_of_parameter(placeholders[name]): id(found[name]) for name in found}
    return named, {
        f"modules_layer_parameters_{name}": id(parameter)
        for name, parameter in model.layer.named_parameters()
    }


def does_a_graph_tell_the_classes_of_its_modules() -> Answer:
    [(graph, _)] = graphs(Model(), X)
    return {Layer, nn.ReLU} & set(dynamo.kinds_of_modules(graph)), {Layer}


def does_a_graph_tell_why_it_ends() -> Answer:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    reasons = [dynamo.why_broken_off(graph) for graph, _ in graphs(broken, X)]
    told = [
        reason and re.sub(r".*(Call to `\S+graph_break).*", r"\1", reason) for reason in reasons
    ]
    return told, ["Call to `torch._dynamo.graph_break", None]


def does_inductor_compile_a_graph_with_further_inputs() -> Answer:
    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graph = dynamo.own_graph(graph)
        *_, last = (node for node in graph.graph.nodes if node.op == "placeholder")
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_after(last):
            further = graph.graph.placeholder("further")
        with graph.graph.inserting_before(output):
            product = graph.graph.call_function(torch.matmul, (output.args[0][0], further))  # type: ignore[index]
        output.args = ((product,),)
        graph.recompile()
        call = dynamo.compile_by_inductor(graph, inputs, [W])
        return lambda *given: call(*given, W)

    torch._dynamo.reset()
    called: Any = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    same = [torch.allclose(called(x), (x + 1) @ W, atol=1e-5) for x in (X, X[:2], X[:1])]
    return same, [True] * 3


def does_inductor_say_that_there_is_no_compiler() -> Answer:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/there/is/none",)}):
        found = dynamo.inductor_finds_a_compiler()
    return (found, dynamo.inductor_finds_a_compiler()), (False, shutil.which("g++") is not None)


QUESTIONS: tuple[Any, ...] = (
    is_a_private_function_answered_by_what_stands_in_for_a_tensor,
    is_matmul_from_the_left_that_from_the_left,
    has_every_node_the_tensor_that_it_gives,
    are_parameters_inputs_of_a_graph_and_named_by_their_path,
    does_a_graph_tell_the_classes_of_its_modules,
    does_a_graph_tell_why_it_ends,
    pytest.param(does_inductor_compile_a_graph_with_further_inputs, marks=pytest.mark.slow),
    does_inductor_say_that_there_is_no_compiler,
)


@pytest.mark.parametrize("version", sorted({*dynamo.KNOWN, INSTALLED}))
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_torch_answers_as_it_is_known_to(question: Callable[[], Answer], version: str) -> None:
    if version != INSTALLED:
        pytest.skip(f"torch {version} is not installed; {torch.__version__} is")
    told = f"torch {torch.__version__} answers otherwise: {question.__name__.replace('_', ' ')}?"
    try:
        answer, known = question()
    except (ImportError, AttributeError, TorchDynamoException) as error:
        raise AssertionError(told) from error
    assert answer == known, told
