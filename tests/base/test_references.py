"""What is held in attributes, containers, closures and methods gives way to others, and is kept."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorize.base.references import replace_held

OLD, NEW = nn.Linear(2, 2), nn.Linear(2, 2)
X = torch.randn(3, 2)
Pair = namedtuple("Pair", "layer number")


def closure() -> Callable[[Tensor], Tensor]:
    layer = OLD
    return lambda x: layer(x)


def nested() -> Callable[[Tensor], Tensor]:
    inner = closure()

    def outer(x: Tensor) -> Tensor:
        return inner(x)

    return outer


def default(x: Tensor, layer: Any = OLD) -> Tensor:
    return layer(x)


def keyword(x: Tensor, *, layer: Any = OLD) -> Tensor:
    return layer(x)


class Helper:
    def __init__(self) -> None:
        self.layers = {"one": (OLD,)}

    def run(self, x: Tensor) -> Tensor:
        return self.layers["one"][0](x)


def decorated() -> Callable[[Tensor], Tensor]:
    @functools.wraps(OLD.forward)
    def run(x: Tensor) -> Tensor:
        return run.__wrapped__(x)  # type: ignore[attr-defined]

    return run


CASES: dict[str, Callable[[], Any]] = {
    "closure": closure,
    "nested": nested,
    "default": lambda: default,
    "keyword": lambda: keyword,
    "method": lambda: OLD.forward,
    "helper": lambda: Helper().run,
    "partial": lambda: functools.partial(lambda layer, x: layer(x), OLD),
    "partial of a method": lambda: functools.partial(OLD.forward),
    "compiled": lambda: torch.compile(OLD.forward, backend="eager"),
    "disabled": lambda: torch.compiler.disable(closure()),
    "decorated": decorated,
}


def swap(value: Any) -> Any:
    return {id(OLD): NEW}.get(id(value), value)


def held(value: Any) -> Any:
    """What a module holds in the place of a value."""
    model: Any = nn.Module()
    model.thing = value if not isinstance(value, nn.Module) else [value]
    replace_held(model, swap)
    return model.thing


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_functions_find_the_other_object(name: str) -> None:
    before = CASES[name]()
    after = held(before)
    assert torch.equal(after(X), NEW(X))
    assert torch.equal(before(X), OLD(X))  # what others hold is as it was


def test_containers_keep_their_kind() -> None:
    after = held([Pair(OLD, 1), OrderedDict(a=[OLD]), SimpleNamespace(b=OLD)])
    assert after[0] == Pair(NEW, 1)
    assert isinstance(after[1], OrderedDict)
    assert after[1]["a"] == [NEW]
    assert after[2].b is NEW


def test_what_holds_nothing_of_it_stays_the_very_object() -> None:
    values = [{"a": [1]}, closure, SimpleNamespace(c="text"), functools.partial(print, 1)]
    assert all(a is b for a, b in zip(held(list(values)), values, strict=True))


def test_cycles_end() -> None:
    ring: list[Any] = [OLD]
    ring.append(ring)
    assert held(ring)[0] is NEW


def test_functions_that_write_to_one_variable_still_do() -> None:
    layer, count = OLD, 0

    def run(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return layer(x)

    def counted() -> int:
        return count

    run_after, counted_after = held((run, counted))
    run_after(X)
    assert counted_after() == counted() == 1
    assert counted_after is counted


def test_compiled_functions_keep_their_backend() -> None:
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    after = held(torch.compile(OLD.forward, backend=backend))
    with torch.no_grad():
        assert torch.equal(after(X), NEW(X))
    assert seen


def test_hooks_stay_removable() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layer = OLD
    handle = model[0].register_forward_hook(lambda module, inputs, output: layer(output))
    replace_held(model, swap)
    with torch.no_grad():
        assert torch.equal(model(X), NEW(model[0].forward(X)))
        handle.remove()
        assert torch.equal(model(X), model[0].forward(X))
