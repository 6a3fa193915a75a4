"""A parameter that is rebuilt at every call looks like the dense one, and computes as it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tensorize.passes.beside.rebuilt import rebuilt

X = torch.randn(3, 6)
IDS = torch.tensor([[0, 3], [2, 2]])

CALLS: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda w: F.linear(X, w),
    "transposed": lambda w: X @ w.t(),
    "embedding": lambda w: F.embedding(IDS, w),
    "einsum": lambda w: torch.einsum("bi,oi->bo", X, w),
    "data": lambda w: w.data * 2,
    "detached": lambda w: w.detach()[1:3].sum(0),
    "stack": lambda w: torch.stack([w, w]),
    "norm": lambda w: w.norm(),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls_give_what_the_dense_weight_gives(name: str) -> None:
    dense = nn.Parameter(torch.randn(5, 6))
    made = 0

    def make() -> Tensor:
        nonlocal made
        made += 1
        return dense.detach()

    got = CALLS[name](rebuilt(dense, make))
    assert type(got) is Tensor or type(got.data) is not type(got)
    assert torch.equal(got + 0, CALLS[name](dense))
    assert made >= 1


@torch.no_grad()
def test_a_module_holds_it_as_its_own() -> None:
    layer, other = nn.Linear(6, 5), nn.Linear(6, 5)
    other.load_state_dict(layer.state_dict())
    other._parameters["weight"] = rebuilt(layer.weight, lambda: layer.weight)
    assert isinstance(other.weight, nn.Parameter)
    assert type(other) is nn.Linear
    assert [name for name, _ in other.named_parameters()] == ["weight", "bias"]
    assert torch.equal(other(X), layer(X))
    assert torch.equal(F.linear(X, other.state_dict()["weight"]), F.linear(X, layer.weight))
    twice = {name: 2 * value for name, value in other.named_parameters()}
    assert torch.equal(functional_call(other, twice, (X,)), 2 * layer(X))


@torch.no_grad()
def test_noise_is_small_and_the_same_each_time() -> None:
    dense = nn.Parameter(torch.randn(50, 60))
    blurred = rebuilt(dense, lambda: dense, noise=1e-3)
    off = (blurred + 0 - dense).abs() / dense.abs()
    assert 5e-4 < float(off.max()) < 1.1e-3
    assert torch.equal(blurred + 0, blurred + 0)
