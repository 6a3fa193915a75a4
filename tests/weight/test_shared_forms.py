"""Weights of one first factor with and without what a change of basis can remove: one model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.passes.lowering.cleanup import RemoveRepeats
from tensorize.weight.install import factored
from tensorize.weight.low_rank import LowRankLinear
from tests.backend.lowered_models import calls, lowered_and_run, traced
from tests.models import CASES, parameters, relative
from tests.weight.factored_models import grouped

X = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
SIDES = {"q": 48 + 16 + 16 + 48, "gate": 64 + 64 + 48}
"""Rows and columns of the weights with one first factor, by the first of them."""


def compressed(*, pivoted: bool = True) -> Any:
    small = tensorize.compile(
        grouped(), 0.5, metric="frobenius", example_inputs=(X,), formats="shared"
    )
    assert {site.shared for site in shared(small)} == {"q.weight", "gate.weight"}
    return (tensorize.weight.pivoted if pivoted else tensorize.weight.plain)(small)


def shared(model: nn.Module) -> list[Any]:
    return [site for site in tensorize.report(model).plan.sites if site.shared is not None]


def assert_tied(model: Any) -> None:
    for first, *others in (("q", "k", "v"), ("gate", "up")):
        for other in others:
            one, two = model.get_submodule(first), model.get_submodule(other)
            assert two.first.weight is one.first.weight
            assert torch.equal(two.order, one.order)
            assert two.input_product is one.input_product
            assert one.input_product.buffers is one._buffers


def test_a_stack_of_weights_has_one_identity() -> None:
    plain, small = compressed(pivoted=False), compressed()
    assert_tied(small)
    after = {site.name: site.parameters_after for site in tensorize.report(small).sites}
    for first, names in (("q", "qkv"), ("gate", ("gate", "up"))):
        (rank,) = small.get_submodule(first).spec.ranks
        assert small.get_submodule(first).first.weight.shape == (rank, 48 - rank)
        assert sum(after[f"{name}.weight"] for name in names) == rank * (SIDES[first] - rank)
    found = tensorize.report(small)
    assert parameters(small) == found.totals.after.parameters == found.plan.predicted.parameters
    assert parameters(small) < parameters(plain)
    orders = 4 * sum(len(w.indices[0]) for _, w in factored(small) if w.spec.pivoted)
    assert found.totals.after.bytes == 4 * parameters(small) + orders
    assert found.plan.predicted.bytes == found.totals.after.bytes


@torch.no_grad()
def test_it_is_the_same_matrix_as_before() -> None:
    plain, small = compressed(pivoted=False), compressed()
    before = {name: weight.dense().double() for name, weight in factored(plain)}
    for name, weight in factored(small):
        exact = weight.with_cores(tuple(core.double() for core in weight.cores)).dense()
        assert relative(exact, before[name]) < 1e-6
    assert relative(small(X), tensorize.densify(small)(X)) < 1e-5


@torch.no_grad()
def test_the_two_forms_are_images_of_each_other() -> None:
    small = compressed()
    wanted, count = small(X), parameters(small)
    assert tensorize.weight.plain(small) is small
    assert not any(weight.spec.pivoted for _, weight in factored(small))
    assert small.k.first.weight is small.q.first.weight
    assert relative(small(X), wanted) < 1e-5
    assert parameters(small) == tensorize.report(small).totals.after.parameters > count
    tensorize.weight.pivoted(small)
    assert_tied(small)
    assert relative(small(X), wanted) < 1e-5
    assert parameters(small) == tensorize.report(small).totals.after.parameters == count


def test_a_full_rank_of_the_stack_stays_plain() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    small = tensorize.compile(
        Pair(), None, ranks={"*": "full"}, example_inputs=(torch.randn(2, 8),)
    )
    # By hand: each is its own matrix times one identity.
    eye = nn.Parameter(torch.eye(8))
    for layer in (small.a, small.b):
        left = nn.Parameter(layer.weight.dense().detach())
        layer.resize(tensorize.TTSpec.low_rank(6, 8, 8), [left, eye])
    before = {name: weight.spec for name, weight in factored(small)}
    tensorize.weight.pivoted(small)
    assert {name: weight.spec for name, weight in factored(small)} == before


def test_gradients_are_those_of_the_plain_form() -> None:
    small = compressed()
    plain = tensorize.weight.plain(copy.deepcopy(small))
    for model in (small, plain):
        model(X).square().sum().backward()
    for name in ("q", "k", "v", "gate", "up"):
        one, two = small.get_submodule(name), plain.get_submodule(name)
        assert relative(one.second.weight.grad, two.second.weight.grad) < 1e-4
        others = two.first.weight.grad.index_select(1, one.order)[:, one.spec.ranks[0] :]
        assert relative(one.first.weight.grad, others) < 1e-4


# --------------------------------------------------------------------------------- its product


def counted(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often a call puts columns in order, and adds those that are kept to a product."""
    seen = {"index_select": 0, "add_": 0}

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            for name in seen:
                seen[name] += str(func).split(".")[1] == name
            return func(*args, **(kwargs or {}))

    with Counting():
        model(x)
    return seen


def own(model: nn.Module) -> dict[str, int]:
    """What that is where every layer works for itself, but those of one first factor together."""
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear) and m.spec.pivoted]
    products = {id(layer.first.weight) for layer in layers}
    return dict.fromkeys(("index_select", "add_"), len(products))


@torch.no_grad()
def test_the_product_with_the_input_is_computed_once() -> None:
    for small in (compressed(), tensorize.weight.pivoted(compressed(pivoted=False))):
        for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert counted(model, X) == own(model)


@torch.no_grad()
def test_in_a_graph_it_is_computed_once() -> None:
    for pivoted in (False, True):
        small = compressed(pivoted=pivoted)
        for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            torch._dynamo.reset()
            whole = calls(traced(model, X).graph)
            lowered, result = lowered_and_run(model, X, RemoveRepeats())
            found = calls(lowered.graph)
            assert relative(result, small(X)) < 1e-6
            layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
            products = len({id(layer.first.weight) for layer in layers})
            if pivoted:
                assert whole.count("in_order.default") == len(layers)
                assert found.count("in_order.default") == products
            assert found.count("linear") == whole.count("linear") - len(layers) + products


@torch.no_grad()
def test_graphs_of_it_are_whole() -> None:
    small = compressed()
    wanted = small(X)
    for backend in ("eager", "tensorize"):
        torch._dynamo.reset()
        how = {"options": {"inner": "eager"}} if backend == "tensorize" else {}
        assert relative(torch.compile(small, backend=backend, fullgraph=True, **how)(X), wanted) < (
            1e-6
        )
    assert relative(torch.export.export(small, (X,)).module()(X), wanted) < 1e-6


# ------------------------------------------------------------------------------------ on a disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_is_saved_loaded_copied_and_pickled(tmp_path: Path, dtype: torch.dtype) -> None:
    small = tensorize.weight.pivoted(
        tensorize.compile(
            grouped().to(dtype), 0.5, metric="frobenius", example_inputs=(X.to(dtype),)
        )
    )
    x = X.to(dtype)
    assert any(site.spec.pivoted for site in shared(small))
    tensorize.save(small, tmp_path)
    for again in (
        tensorize.load(tmp_path, model=grouped(1).to(dtype)),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(again(x), small(x))
        assert parameters(again) == parameters(small)
        assert {n: w.spec for n, w in factored(again)} == {n: w.spec for n, w in factored(small)}
    other = copy.deepcopy(small)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


@torch.no_grad()
def test_transformers_saves_and_loads_it(tmp_path: Path) -> None:
    case = CASES["llama"]
    model: Any = case.model()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.copy_(layer.mlp.gate_proj.weight.flip(0))
    small: Any = tensorize.weight.pivoted(
        tensorize.compile(model, 0.6, example_inputs=case.batch())
    )
    assert any("gate_proj" in site.name and site.spec.pivoted for site in shared(small))
    small.save_pretrained(tmp_path)
    loaded: Any = type(model).from_pretrained(tmp_path)
    assert torch.equal(case.output(loaded), case.output(small))
    assert parameters(loaded) == parameters(small)
    mlp = loaded.model.layers[0].mlp
    assert mlp.up_proj.first.weight is mlp.gate_proj.first.weight
    assert mlp.up_proj.input_product.buffers is mlp.gate_proj._buffers


def test_ranks_that_move_leave_it_as_it_is() -> None:
    small = compressed()
    alone = [m for m in (small.out, small.down) if isinstance(m, LowRankLinear)]
    for layer in alone:
        assert layer.spec.pivoted
    tensorize.weight.plain(small)
    for name in ("q", "gate"):
        assert small.get_submodule(name).spec.ranks
    optimizer = torch.optim.AdamW(small.parameters())
    tensorize.training.RankSchedule(small, optimizer, budget=0.5, start=1, end=5, every=1)
