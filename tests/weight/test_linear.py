"""A linear layer that became two, and what may be assigned in place of a weight.

Shapes: B rows, M rows and N columns of the weight W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorize.algebra.reconstruct import reconstruct
from tensorize.ir.spec import TTSpec
from tensorize.weight.cores import Cores, FactoredLinear
from tensorize.weight.install import install, restore
from tensorize.weight.low_rank import LowRankLinear
from tests.capture.calls import IDS
from tests.weight.factored_models import (
    B,
    M,
    N,
    close,
    draw,
    draw_cores,
    factorize,
    lazy,
    no_dense,
    tied,
)

# --------------------------------------------------------------------------------- the linear layer


def test_a_linear_becomes_two_real_ones() -> None:
    layer = nn.Linear(N, M).double()
    bias = layer.bias
    spec = TTSpec.low_rank(M, N, 2)
    left, right = draw_cores(spec)
    install(nn.Sequential(layer), ("0.weight",), spec, [left, right])
    assert type(layer) is LowRankLinear
    assert [(path, type(child)) for path, child in layer.named_children()] == [
        ("first", nn.Linear),
        ("second", nn.Linear),
    ]
    assert (layer.first.in_features, layer.first.out_features) == (N, 2)
    assert (layer.second.in_features, layer.second.out_features) == (2, M)
    assert (layer.in_features, layer.out_features) == (N, M)
    assert layer.first.weight is right
    assert layer.second.weight is left
    assert layer.first.bias is None
    assert layer.second.bias is layer.bias is bias
    assert (layer.weight.shape, layer.weight.dtype) == ((M, N), torch.float64)


def test_a_linear_that_becomes_a_train_is_no_linear_to_other_tools() -> None:
    model = nn.Sequential(nn.Linear(N, M)).double()
    spec = TTSpec((2, 3), (5, 1), (4,))
    cores = draw_cores(spec)
    install(model, ("0.weight",), spec, cores)
    layer = model[0]
    assert isinstance(layer, FactoredLinear)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert (layer.in_features, layer.out_features) == (N, M)
    x = draw((B, N))
    with no_dense():
        got = model(x)
    close(got, F.linear(x, reconstruct(spec, cores), layer.bias))


def test_the_module_that_the_caller_holds_keeps_its_class() -> None:
    for dense in (nn.Linear(N, M).double(), Conv1D(M, N).double(), nn.Embedding(M, N).double()):
        kind = type(dense)
        factorize(dense, {"weight": ("weight",)})
        assert isinstance(dense, kind)


def test_a_linear_without_bias_has_none() -> None:
    layer = nn.Linear(N, M, bias=False).double()
    spec = TTSpec.low_rank(M, N, 2)
    install(layer, ("weight",), spec, draw_cores(spec))
    assert layer.bias is None
    restore(layer, lambda w: nn.Parameter(w.dense().detach()))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.bias is None


def test_hooks_of_the_dense_layer_stay() -> None:
    layer, calls = nn.Linear(N, M).double(), []
    layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
    layer.register_forward_hook(lambda module, args, output: calls.append("after"))
    layer.register_full_backward_hook(lambda module, gin, gout: calls.append("backward"))
    factorize(layer, {"weight": ("weight",)})
    layer(draw((B, N)).requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    restore(layer, lambda w: nn.Parameter(w.dense().detach()))
    layer(draw((B, N)))
    assert calls[3:] == ["before", "after"]


def test_a_subclass_of_linear_keeps_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(N, M).double()
    oracle = factorize(layer, {"weight": ("weight",)})
    assert isinstance(layer, Doubled)
    with no_dense():
        close(layer(draw((B, N))), oracle(draw((B, N))))


def test_a_transformers_layer_stores_its_matrix_turned() -> None:
    layer = Conv1D(N, M).double()
    factorize(nn.Sequential(layer), {"0.weight": ("0.weight",)})
    assert type(layer) is LowRankLinear
    assert layer.weight.shape == (M, N)
    assert (layer.first.in_features, layer.second.out_features) == (M, N)


def test_shared_linears_share_their_cores() -> None:
    model = nn.ModuleList([nn.Linear(N, M), nn.Linear(N, M)]).double()
    model[1].weight = model[0].weight
    factorize(model, {"0.weight": ("0.weight", "1.weight")})
    assert model[0].first.weight is model[1].first.weight
    assert model[0].bias is not model[1].bias
    assert sum(p.numel() for p in model.parameters()) == 2 * (M + N) + 2 * M


def test_one_module_under_two_names_is_rewritten_once() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(N, M).double()
    factorize(model, {"a.weight": ("a.weight", "b.weight")})
    assert model.a is model.b
    assert type(model.a) is LowRankLinear


# --------------------------------------------------------------------------------------- assignment


def test_tying_again_is_allowed() -> None:
    model, names, _ = tied()
    factorize(model, names)
    before = model(IDS)
    model.tie()
    model.embedding.weight = model.head.weight
    assert torch.equal(model(IDS), before)
    assert sum(p.numel() for p in model.parameters()) == 2 * (M + N)


@pytest.mark.parametrize(
    "value",
    [
        lambda: nn.Parameter(draw((M, N))),
        lambda: draw((M, N)),
        lambda: None,
        lambda: lazy(TTSpec.low_rank(M, N, 2), draw_cores(TTSpec.low_rank(M, N, 2))),
        lambda: lazy(
            TTSpec((2, 1, 3), (1, 5, 1), (2, 3)), draw_cores(TTSpec((2, 1, 3), (1, 5, 1), (2, 3)))
        ),
    ],
    ids=["parameter", "tensor", "None", "other cores", "other format"],
)
@pytest.mark.parametrize("owner", ["embedding", "head"])
def test_assigning_anything_else_says_what_to_do(owner: str, value: Callable[[], Any]) -> None:
    model, names, _ = tied()
    factorize(model, names)
    before = model(IDS)
    with pytest.raises(TypeError, match=r"weight of .* is factorized .* tensorize\.densify"):
        getattr(model, owner).weight = value()
    assert torch.equal(model(IDS), before)


def test_cores_are_a_module_of_parameters() -> None:
    spec = TTSpec((2, 3), (5, 1), (4,))
    cores = draw_cores(spec)
    module = Cores(spec, cores)
    assert [n for n, _ in module.named_parameters()] == ["core_0", "core_1"]
    assert all(a is b for a, b in zip(module().cores, cores, strict=True))
    assert "TTSpec" in repr(module)
