"""What kernels must not take in of a graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tests.kernels import here, holds_under_the_interpreter
from tests.models import relative
from tests.running.fused_graphs import (
    EAGER,
    Block,
    RMSNorm,
    X,
    by_kernels,
    fused,
    swiglu,
    three,
    traced,
)


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    holds_under_the_interpreter(__file__)


def twice(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return three(m, x, y) + y


def activated_twice(m: Block, x: Tensor, y: Tensor) -> Tensor:
    a = m.a(y)
    return F.silu(a) * m.b(y) + a


def written_to(m: Block, x: Tensor, y: Tensor) -> Tensor:
    y = y + 1
    a = m.a(y)
    y.view(-1).mul_(2)
    return a - m.b(y)


def residual_written(m: Block, x: Tensor, y: Tensor) -> Tensor:
    y = y + 1
    y[0] = m.b(x)[0]
    return m.a(x * 2) + y


def broadcast(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return m.a(y) + x[:1]


def in_place(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return m.a(F.relu(m.b(y), inplace=True) + x)


NOT_FUSED = {
    "a norm that something else reads": (Block(twice, RMSNorm(24)), ["3 weights"]),
    "another mean than that of squares": (Block(three, RMSNorm(24, power=4)), ["3 weights"]),
    "a norm over more than the last axis": (Block(three, nn.LayerNorm((5, 24))), ["3 weights"]),
    "a norm without a gain": (
        Block(three, nn.LayerNorm(24, elementwise_affine=False)),
        ["3 weights"],
    ),
    "a product of which something else reads a part": (Block(activated_twice), ["2 weights"]),
    "an input that is written to": (Block(written_to), []),
    "a residual that is written to": (Block(residual_written), []),
    "a residual of another shape": (Block(broadcast), []),
    "an activation in place": (Block(in_place), []),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_must_not_be_fused_is_not(name: str) -> None:
    model, wanted = NOT_FUSED[name]
    assert fused(model) == wanted


@here
@pytest.mark.parametrize("name", NOT_FUSED)
def test_and_its_numbers_are_right(name: str) -> None:
    small = by_kernels(copy.deepcopy(NOT_FUSED[name][0]))
    exact = tensorize.densify(small).double()
    with torch.no_grad():
        y = torch.compile(small, backend="tensorize", options=EAGER)(X)
        assert relative(y, exact(X.double())) < 1e-6


def test_a_train_takes_no_norm_and_is_no_part_of_a_group() -> None:
    formats, ranks = {"a.weight": "tt", "*": "low_rank"}, {"a.weight": "full", "*": 6}
    model = Block(three, nn.LayerNorm(24))
    assert fused(model, X, formats=formats, ranks=ranks) == ["2 weights"]


@here
def test_nothing_is_fused_where_there_are_gradients() -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    compiled = torch.compile(small, backend="tensorize", options=EAGER)
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in small.named_parameters()}
    mine, x.grad = x.grad, None
    small.zero_grad()
    small(x).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
    assert tensorize.report(small).fused == ()
    small.requires_grad_(False)  # and where only the input has one
    torch._dynamo.reset()
    (of_x,) = torch.autograd.grad(
        torch.compile(small, backend="tensorize", options=EAGER)(x).square().sum(), x
    )
    torch.testing.assert_close(of_x, mine)


def test_a_model_that_runs_by_torch_operations_is_left_alone() -> None:
    model = Block(three, RMSNorm(24)).eval()
    small = tensorize.compile(
        model, None, example_inputs=(X,), ranks={"*": 6}, formats="low_rank", backend="aten"
    )
    assert traced(small, X).fused == ()
