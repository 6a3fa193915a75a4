"""Guarded models that run by kernels: launches check their products and count what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.ir.work import work_of
from tests.kernels import here, holds_under_the_interpreter
from tests.running.fused_graphs import EAGER, Block, RMSNorm, X, by_kernels, mlp, swiglu, traced
from tests.running.fused_graphs import three as grouped

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__)


LAUNCHES = {
    "grouped": (Block(grouped, RMSNorm(24)), ["rms norm, 3 weights, guard"]),
    "gated": (
        Block(swiglu, RMSNorm(24)),
        ["rms norm, 2 weights, silu, gated, guard", "residual, guard"],
    ),
    "an MLP": (Block(mlp), ["gelu_tanh, guard", "scale 0.5, residual, guard"]),
    "one weight": (Block(lambda m, x, y: m.a(x)), ["guard"]),
}


def guarded(name: str, **options: Any) -> nn.Module:
    """Limits of the dense library's rounding: kernels need a GPU, or the interpreter."""
    small = by_kernels(copy.deepcopy(LAUNCHES[name][0])).requires_grad_(False)
    torch.manual_seed(0)
    data = [torch.randn(64, 24) for _ in range(4)]
    with tensorize.weight.whole_model.other_kernels(small, lambda spec: {}):
        return tensorize.guard(small, calibration=data, **options)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_takes_the_checks_of_its_weights(name: str) -> None:
    program = traced(guarded(name), X)
    assert [work.fused for work, _ in program.fused] == LAUNCHES[name][1]
    targets = [str(node.target) for node in program.graph.graph.nodes]
    assert not any("wrong_rows" in target for target in targets)
    weights = sum(len(work.specs) for work, _ in program.fused)
    assert targets.count("add_") == weights
    assert targets.index("add_") > targets.index("tensorize.triton_guarded.default")


def test_a_check_whose_product_no_launch_computes_stays_as_it_was() -> None:
    small: Any = guarded("one weight").double()
    data = [torch.randn(64, 24).double() for _ in range(4)]
    program = traced(tensorize.guard(small, calibration=data), X.double())
    assert program.fused == ()
    (check,) = (n for n in program.graph.graph.nodes if "wrong_rows" in str(n.target))
    assert all(isinstance(value, torch.fx.Node) for value in check.args[:5])


@here
def test_the_launch_that_checks_passes_opcheck() -> None:
    for name in ("grouped", "one weight"):
        program = traced(guarded(name), X)
        module = program.graph
        (node,) = (n for n in module.graph.nodes if "triton_guarded" in str(n.target))
        work = work_of(node.args[1])
        shapes = work.input_shapes(3)
        inputs = [torch.randn(shape) for shape in shapes]
        signs = [torch.ones(spec.shape[0]) for spec in work.specs]
        sums = [torch.randn(spec.shape[1]) for spec in work.specs]
        given = inputs, node.args[1], signs, sums, [1.0, 1.0] * len(work.specs)
        torch.library.opcheck(torch.ops.tensorize.triton_guarded, given)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.data for name, p in model.named_parameters() if name.startswith("a.first")]


@here
@torch.no_grad()
@pytest.mark.parametrize("name", ["gated", "one weight"])
def test_a_flipped_bit_is_counted_mended_and_the_graph_run_again(name: str) -> None:
    model = guarded(name)
    fast = torch.compile(model, backend="tensorize", options=EAGER, fullgraph=True)
    want = fast(X)
    assert tensorize.guard_report(model).faults == ()
    (weight,) = weights_of(model)
    before = weight.clone()
    weight.view(torch.int32)[2, 3] ^= 1 << 27
    assert torch.equal(fast(X), want)
    assert torch.equal(weight, before)
    (fault,) = tensorize.guard_report(model).faults
    assert (fault.weight, fault.outcome) == ("a.weight", "mended")
    weight_of: Any = model
    weight_of.a.first.weight.mul_(1.5)  # which is no fault
    assert not torch.equal(fast(X), want)
    assert len(tensorize.guard_report(model).faults) == 1


@here
@torch.no_grad()
def test_a_graph_raises_where_it_is_asked_to_and_where_nothing_can_be_mended() -> None:
    model = guarded("one weight", on_fault="raise")
    fast = torch.compile(model, backend="tensorize", options=EAGER)
    fast(X)
    (weight,) = weights_of(model)
    weight[2, 3] += 1.0
    damaged = weight.clone()
    with pytest.raises(tensorize.FaultError, match=r"a\.weight.*nothing was changed"):
        fast(X)
    assert torch.equal(weight, damaged)
    heard: list[Any] = []
    model = guarded("one weight", on_fault=heard.append)
    fast = torch.compile(model, backend="tensorize", options=EAGER)
    fast(X)
    weights_of(model)[0][1:4, 2:5] += 1.0
    with pytest.raises(tensorize.FaultError, match="is damaged"):
        fast(X)
    assert [fault.weight for fault in heard] == ["a.weight"]


def test_weights_that_store_no_identity_are_launches_too() -> None:
    small = tensorize.weight.pivoted(by_kernels(Block(grouped, RMSNorm(24))))
    (work, _), *others = traced(small.requires_grad_(False), X).fused
    assert not others
    assert work.fused == "rms norm, 3 weights"
    assert all(spec.pivoted for spec in work.specs)


@here
@torch.no_grad()
def test_weights_that_store_no_identity_give_what_whole_ones_do() -> None:
    whole = by_kernels(Block(swiglu, RMSNorm(24))).requires_grad_(False)
    want = whole(X)
    small = tensorize.weight.pivoted(copy.deepcopy(whole))
    fast = torch.compile(small, backend="tensorize", options=EAGER, fullgraph=True)
    assert torch.allclose(small(X), want, atol=1e-5)
    assert torch.allclose(fast(X), want, atol=1e-5)
    assert any(spec.pivoted for work, _ in traced(small, X).fused for spec in work.specs)
