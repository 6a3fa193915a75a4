"""What kernels take in of a graph: norms, elementwise work, weights of one input."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tensorize
from tensorize.base.dynamo import own_graph
from tensorize.codegen.device import launch
from tensorize.graphview.text import print_graph
from tensorize.weight.whole_model import settle
from tests.kernels import each_device, here, holds_under_the_interpreter
from tests.models import relative
from tests.paths import GOLDEN
from tests.running.fused_graphs import (
    EAGER,
    Block,
    RMSNorm,
    X,
    _stand_in,
    by_kernels,
    fused,
    mlp,
    swiglu,
    three,
    traced,
)


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    holds_under_the_interpreter(__file__)


# ------------------------------------------------------------------------------------- small graphs

FUSED = {
    "rms norm and three weights": (Block(three, RMSNorm(24)), ["rms norm, 3 weights"]),
    "nn.RMSNorm": (Block(three, nn.RMSNorm(24, eps=1e-5)), ["rms norm, 3 weights"]),
    "a gain that is computed": (Block(three, RMSNorm(24, shift=1.0)), ["rms norm, 3 weights"]),
    "layer norm": (Block(three, nn.LayerNorm(24)), ["layer norm, 3 weights"]),
    "gated": (Block(swiglu, RMSNorm(24)), ["rms norm, 2 weights, silu, gated", "residual"]),
    "an MLP": (Block(mlp), ["gelu_tanh", "scale 0.5, residual"]),
    "dropout between": (
        Block(lambda m, x, y: x + F.dropout(m.a(F.dropout(y, 0.1, m.training)), 0.1, m.training)),
        ["residual"],
    ),
    "relu": (Block(lambda m, x, y: m.b(torch.relu(m.a(y)))), ["relu"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_launch_takes_in_what_is_around_its_weights(name: str) -> None:
    model, wanted = FUSED[name]
    assert fused(model) == wanted


@each_device
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_graph_computes_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    small = by_kernels(copy.deepcopy(FUSED[name][0])).to(device)
    exact = tensorize.densify(small).double()
    small = small.to(dtype)
    if dtype == torch.bfloat16:  # what was rounded is what the oracle has
        exact = tensorize.densify(small).double()
    for rows in (1, 5, 40):
        x = torch.randn(rows, 24, device=device).to(dtype)
        with torch.no_grad():
            y = torch.compile(small, backend="tensorize", options=EAGER)(x)
            assert y.dtype == dtype
            # Three roundings in a row: of the norm, of what is between the factors, of the result.
            assert relative(y, exact(x.double())) < 6 * torch.finfo(dtype).eps


@each_device
def test_a_norm_without_an_eps_has_that_of_the_dtype_it_is_computed_in(device: str) -> None:
    """Which for small entries in bfloat16 decides how large they become."""
    small = by_kernels(Block(three, nn.RMSNorm(24))).to(device).bfloat16()
    x = (0.01 * torch.randn(40, 24, device=device)).bfloat16()
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 2**-23).rsqrt()
    dense = tensorize.densify(small).double()
    dense.norm = nn.Identity()
    with torch.no_grad():
        wanted = dense.behind(dense, x.double(), normed)
        y = torch.compile(small, backend="tensorize", options=EAGER)(x)
    assert relative(y, wanted) < 6 * torch.finfo(torch.bfloat16).eps


def test_the_text_of_a_fused_graph_is_golden() -> None:
    """``UPDATE_GOLDEN=1`` writes it again."""
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, values: list) -> object:
        graphs.append(own_graph(graph))
        return lambda *_: _stand_in(graph)

    with torch.no_grad():
        torch.compile(small, backend=keep)(X)
    after = traced(small, X).graph
    text = print_graph(graphs[0]) + "\n\n" + print_graph(after) + "\n"
    path = GOLDEN / "fused_graph.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


# --------------------------------------------------------------------- one first factor for several


def of_one_first_factor() -> nn.Module:
    """A gated layer whose gate and up have their first factor in common."""
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    small.b.first.weight = small.a.first.weight
    settle(small)
    return small


def test_weights_of_one_first_factor_are_one_launch_with_one_product() -> None:
    works = [work for work, _ in traced(of_one_first_factor(), X).fused]
    assert [work.fused for work in works] == [
        "rms norm, 2 weights of one first factor, silu, gated",
        "residual",
    ]


@here
def test_eager_and_compiled_they_compute_their_product_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = of_one_first_factor()
    exact = tensorize.densify(small).double()(X.double())
    launched: list[str] = []
    launch_it = launch.run
    monkeypatch.setattr(
        launch, "run", lambda source, *t: (launched.append(source.name), launch_it(source, *t))
    )
    products = []
    small.a.first.register_forward_hook(lambda *_: products.append("a"))
    small.b.first.register_forward_hook(lambda *_: products.append("b"))
    linear = F.linear
    with torch.no_grad():
        assert relative(small(X), exact) < 1e-6
    assert products == ["a", "b"]  # hooks are kept: then every layer computes its own
    small.a.first._forward_hooks.clear()
    small.b.first._forward_hooks.clear()
    read: list[Tensor] = []
    monkeypatch.setattr(F, "linear", lambda x, w, *b: (read.append(w), linear(x, w, *b))[1])
    launched.clear()
    with torch.no_grad():
        assert relative(small(X), exact) < 1e-6
    assert sum(w is small.a.first.weight for w in read) == 1
    assert len(launched) == 1  # the third weight
    monkeypatch.setattr(F, "linear", linear)
    launched.clear()
    with torch.no_grad():
        assert relative(torch.compile(small, backend="tensorize", options=EAGER)(X), exact) < 1e-6
    assert launched == ["decode", "decode"]
    small(X).sum().backward()
    assert small.a.first.weight.grad is not None
