"""Projections of one input become one product, and follow their weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.passes.lowering.cleanup import RemoveDead
from tensorize.passes.lowering.graph import lower
from tensorize.passes.lowering.group import GroupProjections
from tests.backend.lowered_models import (
    EAGER,
    Attention,
    X,
    calls,
    compressed,
    lowered_and_run,
    traced,
)
from tests.models import CASES, relative


def test_projections_of_one_token_become_two_calls() -> None:
    program = traced(compressed(), X)
    assert calls(program.graph).count("linear") == 8
    lowered = lower(program, (GroupProjections(), RemoveDead()))
    # q, k and v (first and second factors) are one call; the output projection is left.
    assert calls(lowered.graph) == [
        "reshape",
        "expand",
        "bmm",
        "baddbmm",
        "unbind",
        *["getitem", "reshape"] * 3,
        "mul",
        "add",
        "linear",
        "linear",
    ]


def test_grouping_does_not_fire_for_many_rows_or_unknown_ones() -> None:
    many = traced(compressed(), torch.randn(1, 7, 32))
    assert "bmm" not in calls(lower(many, (GroupProjections(),)).graph)
    assert "bmm" in calls(lower(many, (GroupProjections(most_rows=7),)).graph)


def test_grouping_does_not_fire_where_the_input_is_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    model = Writes()
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        assert relative(lowered(X), model(X)) < 1e-6
    program = lower(traced(model, X), (GroupProjections(),))
    assert "bmm" not in calls(program.graph)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_copies_are_not_taken_while_training_and_training_is_the_same(
    rows: int, inner: str
) -> None:
    model, x = compressed().train(), torch.randn(1, rows, 32)
    lowered = torch.compile(model, backend="tensorize", options={"inner": inner})
    lowered(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(relative(got[n], p.grad) < 1e-5 for n, p in model.named_parameters())


def test_packed_weights_follow_changes_in_place() -> None:
    model = compressed()
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        lowered(X)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert relative(lowered(X), model(X)) < 1e-5
        other = compressed()
        model.load_state_dict(other.state_dict())
        assert relative(lowered(X), other(X)) < 1e-5


@pytest.mark.parametrize("bias", ["none", "all", "some"])
@pytest.mark.parametrize("chained", [False, True])
def test_grouped_linears_are_the_linears(bias: str, chained: bool) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            has = {"none": (False,) * 3, "all": (True,) * 3, "some": (True, False, True)}[bias]
            ranks = (4, 4, 4) if chained else (3, 5, 7)
            self.first = nn.ModuleList(nn.Linear(32, r, b) for r, b in zip(ranks, has, strict=True))
            self.second = nn.ModuleList(nn.Linear(4, 24, b) for b in has)

        def forward(self, x: Tensor) -> list[Tensor]:
            if not chained:
                return [first(x) for first in self.first]
            pairs = zip(self.first, self.second, strict=True)
            return [second(first(x)) for first, second in pairs]

    model, x = Branches(), torch.randn(1, 2, 32)
    lowered, found = lowered_and_run(model, x, GroupProjections(most_rows=2), RemoveDead())
    assert "linear" not in calls(lowered.graph)
    for got, want in zip(found, model(x), strict=True):
        assert got.shape == want.shape
        assert relative(got, want.detach()) < 1e-6


@pytest.mark.parametrize("options", [EAGER, {}, {"budget": 0.4}])
def test_layers_that_are_compiled_one_by_one_keep_their_own_weights(options: dict) -> None:
    """Dynamo gives all of them one graph: they differ in nothing but their parameters."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(Attention() for _ in range(3))).eval()
    whole = {"example_inputs": (X,), "metric": "frobenius"}
    want = nn.Sequential(*(tensorize.compile(layer, 0.4, **whole) for layer in dense)).eval()
    model = copy.deepcopy(dense if "budget" in options else want)
    lowered = nn.Sequential(
        *(torch.compile(layer, backend="tensorize", options=options) for layer in model)
    )
    with torch.no_grad():
        assert relative(lowered(X), want(X)) < 1e-5


def test_a_parameter_that_takes_the_place_of_another_is_what_runs() -> None:
    model = compressed()
    lowered = torch.compile(model, backend="tensorize")
    with torch.no_grad():
        lowered(X)
        for layer in (model.q, model.out):
            layer.second.weight = nn.Parameter(torch.randn(32, 4))
            assert relative(lowered(X), model(X)) < 1e-5


def test_unequal_shapes_are_grouped_apart() -> None:
    """Grouped-query attention: k and v are narrower than q."""
    case = CASES["llama"]
    small = tensorize.compile(
        case.model(), None, ranks={"*self_attn*": 4}, example_inputs=case.batch()
    )
    lowered = torch.compile(small, backend="tensorize", options=EAGER)
    with torch.no_grad():
        one = torch.randint(3, 128, (1, 1))
        got = lowered(input_ids=one, use_cache=False).logits
        assert relative(got, small(input_ids=one, use_cache=False).logits) < 1e-5
