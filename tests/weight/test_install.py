"""Whole models with cores in place of weights: outputs, copies, states, modes and traces.

Shapes: B and T rows, M rows and N columns of the weight W, E experts.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorize.ir.spec import TTSpec
from tensorize.weight.install import core_names, factored, install, restore
from tests.capture.calls import IDS
from tests.weight.factored_models import (
    B,
    E,
    M,
    N,
    T,
    close,
    draw,
    draw_cores,
    factorize,
    no_dense,
    spec_of,
    tied,
)


class Functional(nn.Module):
    """Uses a bare parameter by ``F.linear``, and another by ``@``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(draw((M, N)))
        self.b = nn.Parameter(draw((M, N)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a) @ self.b


class Experts(nn.Module):
    """A stack of experts, each applied to some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(draw((E, M, N)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, self.stack[e]) for e in range(E)])


def linear() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return nn.Linear(N, M).double(), {"weight": ("weight",)}, draw((B, N))


def conv1d_of_transformers() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Conv1D(N, M).double(), {"weight": ("weight",)}, draw((B, T, M))


def embedding() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return nn.Embedding(M, N, padding_idx=1).double(), {"weight": ("weight",)}, IDS


def functional() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Functional(), {"a": ("a",), "b": ("b",)}, draw((B, N))


def convolution() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    model = nn.Conv2d(2, 6, (3, 2), stride=2, padding=1).double()
    return model, {"weight": ("weight",)}, draw((B, 2, 7, 8))


def experts() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Experts(), {"stack": ("stack",)}, draw((B, N))


def nested() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    model = nn.Sequential(nn.Embedding(7, N), Functional(), nn.Tanh(), nn.Linear(N, M)).double()
    names = ("0.weight", "1.a", "1.b", "3.weight")
    return model, {name: (name,) for name in names}, IDS


MODELS = {
    build.__name__: build
    for build in (
        linear,
        conv1d_of_transformers,
        embedding,
        functional,
        tied,
        convolution,
        experts,
        nested,
    )
}
ALL = pytest.mark.parametrize("name", MODELS)


@ALL
def test_a_rewritten_model_gives_the_same_outputs_without_a_dense_matrix(name: str) -> None:
    model, names, x = MODELS[name]()
    oracle = factorize(model, names)
    assert all(n not in dict(model.named_parameters()) for n in names)
    with no_dense():
        got = model(x)
    close(got, oracle(x), 512)


@ALL
def test_the_dense_weight_is_freed(name: str) -> None:
    model, names, _ = MODELS[name]()
    watched = [weakref.ref(p) for n, p in model.named_parameters() if n in names]
    storages = [weakref.ref(ref().untyped_storage()) for ref in watched]  # type: ignore[union-attr]
    for n, aliases in names.items():
        spec = spec_of(dict(model.named_parameters())[n])
        install(model, aliases, spec, draw_cores(spec))
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(names)
    assert [ref() for ref in storages] == [None] * len(names)


@ALL
def test_install_and_restore_give_back_the_model_that_was(name: str) -> None:
    model, names, x = MODELS[name]()
    types = {path: type(module) for path, module in model.named_modules()}
    keys = [(key, value.shape) for key, value in model.state_dict().items()]
    own = {path: set(module.__dict__) for path, module in model.named_modules()}
    modules = dict(model.named_modules())
    oracle = factorize(model, names)
    restore(model, lambda w: nn.Parameter(w.dense().detach().contiguous()))
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert all(modules[path] is module for path, module in model.named_modules())
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == own
    assert sorted((key, value.shape) for key, value in model.state_dict().items()) == sorted(keys)
    close(model(x), oracle(x))
    state = oracle.state_dict()
    for key, value in model.state_dict().items():
        close(value, state[key])


def test_restored_ties_are_ties() -> None:
    model, names, _ = tied()
    factorize(model, names)
    restore(model, lambda w: nn.Parameter(w.dense().detach()))
    assert model.head.weight is model.embedding.weight


@ALL
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_from_cores_of_their_own(
    name: str, clone: Callable[[nn.Module], nn.Module]
) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    twin = clone(model)
    with no_dense():
        assert torch.equal(twin(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[key] is not other[key] for key in own)
    before = model(x)
    with torch.no_grad():
        for parameter in other.values():
            parameter.add_(1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@ALL
def test_state_dict_holds_the_cores_and_loads_again(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {core for n in names for core in core_names(model, n)}
    assert expected <= set(state)
    assert not set(names) & set(state)
    before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(model(x), before)


def test_the_names_of_the_cores() -> None:
    model, names, _ = nested()
    factorize(model, names)
    assert list(model.state_dict()) == [
        "0.weight_cores.core_0",
        "0.weight_cores.core_1",
        "1.a_cores.core_0",
        "1.a_cores.core_1",
        "1.b_cores.core_0",
        "1.b_cores.core_1",
        "3.first.weight",
        "3.second.weight",
        "3.second.bias",
    ]
    assert [n for n, _ in factored(model)] == ["0.weight", "1.a", "1.b", "3.weight"]


@ALL
def test_every_core_takes_its_gradient(name: str) -> None:
    model, names, x = MODELS[name]()
    oracle = factorize(model, names)
    with no_dense():
        model(x).square().sum().backward()
    oracle(x).square().sum().backward()
    gradients = dict(oracle.named_parameters())
    for n, lazily in factored(model):
        if n not in names:
            continue  # the other name of a tied weight
        dense = lazily.dense()
        wanted = torch.autograd.grad(dense, lazily.cores, gradients[n].grad)
        for core, want in zip(lazily.cores, wanted, strict=True):
            owner = core if core.grad is not None else None
            assert owner is not None, f"{n} has a core without a gradient"
            close(core.grad, want, 4096)


@ALL
def test_frozen_weights_have_frozen_cores_and_modes_reach_every_part(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    model.requires_grad_(False)
    assert not model(x).requires_grad
    for training in (False, True):
        model.train(training)
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_new_parts_are_in_the_mode_of_their_owner(training: bool) -> None:
    for build in MODELS.values():
        model, names, _ = build()
        model.train(training)
        factorize(model, names)
        assert all(module.training is training for module in model.modules())


@ALL
def test_every_dtype_cast_reaches_the_cores(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {w.dtype for _, w in factored(model)} == {torch.float32}
    assert model(x.float() if x.is_floating_point() else x).dtype == torch.float32


@ALL
@pytest.mark.parametrize("way", ["compile", "export"])
def test_torch_traces_the_contractions(name: str, way: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    want = model(x)
    with no_dense():
        if way == "compile":
            traced: Callable = torch.compile(model, backend="eager", fullgraph=True)
        else:
            traced = torch.export.export(model.eval(), (x,)).module()
        close(traced(x), want)


def test_torch_traces_tensor_trains() -> None:
    class Train(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(draw((M, N)))

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(F.embedding(ids, self.w), self.w)

    model = Train()
    spec = TTSpec((2, 3), (5, 1), (4,))
    install(model, ("w",), spec, draw_cores(spec))
    want = model(IDS)
    with no_dense():
        close(torch.compile(model, backend="eager", fullgraph=True)(IDS), want)
        close(torch.export.export(model, (IDS,)).module()(IDS), want)
