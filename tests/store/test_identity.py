"""What two things compute with is the same or not: by content, in any process."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import os
import subprocess
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.ir.sites import Batch
from tensorize.store.identity import Opaque, content
from tests.models import CASES
from tests.paths import ROOT

SCALE = 2.0
Pair = namedtuple("Pair", "left right")


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@dataclasses.dataclass
class Options:
    width: int = 4
    slopes: tuple[float, ...] = (0.5, 0.25)
    names: frozenset[str] = frozenset({"a", "b", "c"})
    mode: Mode = Mode.FAST


class Net(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.memory = nn.GRU(4, 4)
        self.heads, self.options, self.act = 2, Options(), F.gelu
        self.slopes, self.table = [0.5] * 8, np.arange(5000.0)
        self.where = {"a": 1, "b": {3, 1, 2}}
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x)) * SCALE


def net(**given: Any) -> Net:
    torch.manual_seed(0)
    return Net(**given)


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


def other_middle() -> np.ndarray:
    table = np.arange(5000.0)
    table[2500] += 1
    return table


def patched(model: Net) -> None:
    model.forward = types.MethodType(lambda self, x: self.layer(x), model)  # type: ignore[method-assign]


def change(path: str, value: Any) -> Callable[[Net], None]:
    owner, _, leaf = path.rpartition(".")
    return lambda model: setattr(
        functools.reduce(getattr, filter(None, owner.split(".")), model), leaf, value
    )


class Twin(Net):
    """The same under another name."""


CHANGES: dict[str, Callable[[Net], Any]] = {
    "an int": change("heads", 4),
    "its type": change("heads", 2.0),
    "an eps of a norm": change("norm.eps", 1e-3),
    "a list of floats": change("slopes", [0.5] * 7 + [0.25]),
    "the middle of an array": change("table", other_middle()),
    "the dtype of an array": change("table", np.arange(5000.0).astype("float32")),
    "an array of objects": change("table", np.array([1, "x", None], dtype=object)),
    "a nested option": lambda m: m.options.__setattr__("slopes", (0.5, 0.26)),
    "an enum": lambda m: m.options.__setattr__("mode", Mode.SLOW),
    "a function": change("act", F.silu),
    "a partial": change("act", functools.partial(F.gelu, approximate="tanh")),
    "a set": lambda m: m.where.__setitem__("b", {3, 1, 4}),
    "a patched forward": patched,
    "a hook": lambda m: m.layer.register_forward_hook(lambda mod, args, out: 2 * out),
    "a hook of a weight": lambda m: m.layer.weight.register_hook(lambda g: 2 * g),
    "a module kept in a list": lambda m: m.__dict__.__setitem__("beside", [nn.Linear(2, 2)]),
    "a tie": lambda m: setattr(m.memory, "weight_hh_l0", m.memory.weight_ih_l0),
    "a dropout": lambda m: m.add_module("drop", nn.Dropout(0.1)),
    "a class": change("__class__", Twin),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_a_model_computes_with_is_told(what: str) -> None:
    model = net()
    before = content(model)
    CHANGES[what](model)
    assert content(model) != before
    assert content(model) == content(model)


def test_what_it_does_not_compute_with_is_not() -> None:
    model = net()
    before = content(model)
    model.train()
    model(torch.ones(2, 4)).sum().backward()
    assert content(model.eval()) == before
    assert content(copy.deepcopy(model)) == before
    assert content(net()) == before


def test_code_is_told_by_all_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(act=scaled(2.0))
    before = content(model)
    assert content(net(act=scaled(2.0))) == before
    assert content(net(act=scaled(3.0))) != before  # a closure
    assert content(net(act=lambda x, by=2.0: x * by)) != before
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert content(model) != before  # a constant of the file
    monkeypatch.undo()
    monkeypatch.setattr(Net, "forward", lambda self, x: x)
    assert content(model) != before
    monkeypatch.undo()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)  # of a library
    assert content(model) != before
    monkeypatch.undo()
    monkeypatch.setattr(F, "gelu", scaled(1.0))
    assert content(model) != before  # what code takes out of a library, put there by others
    assert content(net()) != content(net(act=None))


DATA: list[Any] = [
    torch.arange(4.0),
    torch.arange(4),
    torch.arange(4.0).bfloat16(),
    torch.arange(4.0).reshape(2, 2),
    torch.tensor([1 + 2j, 3j]),
    torch.tensor([1 + 2j, 3j]).conj(),
    torch.arange(4.0).reshape(2, 2).t(),
    torch.eye(3).to_sparse(),
    np.arange(3000),
    other_middle(),
    np.float32(1.0),
    np.array(["a", "b"]),
    np.ma.MaskedArray([1, 2, 3], mask=np.array([False, True, False])),
    "text",
    b"text",
    1,
    True,
    1.0,
    None,
    [1, 2],
    (1, 2),
    {"a": 1},
    {1: "a"},
    {1, 2},
    Pair(1, 2),
    Options(),
    Options(width=5),
    Mode.FAST,
    range(3),
    slice(1, 2),
    np.random.RandomState(3),
    torch.Generator().manual_seed(3),
]


def test_data_are_told_apart_and_found_again() -> None:
    found = [content(Batch((value,), {"x": value}, None)) for value in DATA]
    assert len(set(found)) == len(DATA)
    again = copy.deepcopy([value for value in DATA if not isinstance(value, torch.Generator)])
    assert {content(Batch((value,), {"x": value}, None)) for value in again} <= set(found)
    one, other = Batch((), {"a": 1, "b": 2}, None), Batch((), {"b": 2, "a": 1}, None)
    assert content(one) == content(other)
    assert content(one) != content(Batch((), {"a": 2, "b": 1}, None))


@pytest.mark.parametrize(
    "value",
    [(x for x in [1, 2]), sys.__stdin__, memoryview(b"x"), threading.local()],
    ids=["generator", "file", "memory", "thread"],
)
def test_what_cannot_be_looked_into_is_said_by_its_place(value: Any) -> None:
    model = net(options={"held": [1, value]})
    with pytest.raises(Opaque, match=r"options\.held"):
        content(model)
    with pytest.raises(Opaque):
        content(Batch((value,), {}, None))


SCRIPT = """
import torch
from tensorize.store.identity import content
from tests.models import CASES
from tests.store.test_identity import DATA, net, scaled
state = [value for value in DATA]
print(content(net(act=scaled(2.0))), content(*state))
for name in ("gpt", "llama", "t5"):
    torch.manual_seed(0)
    print(content(CASES[name].model()))
"""


def test_another_process_finds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    exec(SCRIPT, {})
    assert done.stdout == capsys.readouterr().out
    assert len(set(done.stdout.split())) == 5


@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral"])
def test_a_run_of_a_model_changes_nothing(name: str) -> None:
    case = CASES[name]
    model = case.model()
    before = content(model)
    case.output(model)
    assert content(model) == before
