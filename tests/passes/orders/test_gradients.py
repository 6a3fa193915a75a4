"""Contractions with a backward of their own: its text, and right gradients of every order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tensorize.codegen.aten import gradients as training
from tensorize.formats import interpret
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.gradients import plan_training
from tensorize.weight.contractions import contractions
from tests.passes.orders.test_by_flops import blocks, specs
from tests.passes.orders.training_cases import (
    SIDES,
    SPECS,
    chosen,
    close,
    draw_cores,
    draw_x,
    gradients,
    in_use,
    quick,
    realistic,
    wanted_of,
)

# ------------------------------------------------------------------------------------- emitted text


def test_a_backward_reads_like_this() -> None:
    text = training.emit(plan_training(TTSpec((16, 16), (16, 16), (8,))))
    assert text[text.index("def backward") :] == BACKWARD


BACKWARD = '''\
def backward(g, x, cores, saved):
    """Gradients of x, core 0, core 1, from that at y.

    Cores and sizes are those of forward.
    """
    c0, c1 = cores
    lead = g.shape[:-1]
    g = g.reshape(-1, 256)
    # Rows from 1 on
    x = x.reshape(-1, 256)
    (s0,) = saved
    # s1 (B, m0, r1, n1) = g (B, m0, m1) · c1 (r1, m1, n1) over m1
    s1 = F.linear(g.reshape(-1, 16), c1.permute(0, 2, 1).reshape(128, 16))
    # t0 (B, n0, n1) = c0 (m0, n0, r1) · s1 (B, m0, r1, n1) over m0, r1
    t0 = c0.permute(1, 0, 2).reshape(16, 128) @ s1.reshape(-1, 128, 16)
    dx = t0.reshape(*lead, 256)
    # t1 (m0, r1, n0) = s1 (B, m0, r1, n1) · x (B, n0, n1) over B, n1
    s1_1 = s1.reshape(-1, 16, 8, 16).permute(1, 2, 0, 3).reshape(128, -1)
    x_1 = x.reshape(-1, 16, 16).permute(1, 0, 2).reshape(16, -1)
    t1 = F.linear(s1_1, x_1)
    d0 = t1.reshape(16, 8, 16).permute(0, 2, 1).reshape(16, 16, 8)
    # t2 (m1, r1, n1) = g (B, m0, m1) · s0 (B, m0, r1, n1) over B, m0
    t2 = g.reshape(-1, 16).mT @ s0.reshape(-1, 128)
    d1 = t2.reshape(16, 8, 16).permute(1, 0, 2).reshape(8, 16, 16)
    return dx, d0, d1
'''


def test_emitted_lines_are_short() -> None:
    for spec, limit in itertools.product((*SPECS, *realistic()), (None, 0)):
        text = training.emit(plan_training(spec, memory_limit=limit))
        code = [line for line in text.splitlines() if not line.strip().startswith("#")]
        assert max(map(len, code)) <= 120


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_gradients_are_those_of_the_interpreter(
    spec: TTSpec, contract: str, limit: int | None
) -> None:
    planned = contractions(spec, memory_limit=limit)[contract]
    cores = draw_cores(spec)
    turns = in_use(spec, contract).breakpoints
    for lead in ((0,), (1,), (2, 0, 3), (2, 3), (40,), *((turn,) for turn in turns if turn < 99)):
        x = draw_x(spec, contract, lead)
        got, want = planned(x, cores), interpret.apply(spec, cores, x, contract)
        assert "Planned" in type(got.grad_fn).__name__
        close(got, want)
        for a, b in zip(gradients(got, (x, *cores)), gradients(want, (x, *cores)), strict=True):
            close(a, b)


@quick
@given(specs(3) | blocks(), st.sampled_from(SIDES), st.sampled_from([None, 0, 50]), wanted_of)
def test_gradients_of_any_spec_and_of_any_operands(
    spec: TTSpec, contract: str, limit: int | None, flags: list[bool]
) -> None:
    asked = chosen(spec, flags)
    cores = draw_cores(spec)
    x = draw_x(spec, contract, (3,))
    for operand, tensor in zip(("x", *range(len(cores))), (x, *cores), strict=True):
        tensor.requires_grad_(operand in asked)
    operands = [t for t in (x, *cores) if t.requires_grad]
    planned = contractions(spec, memory_limit=limit)
    if not planned:
        return  # low rank, which without a limit is two linears
    got, want = planned[contract](x, cores), interpret.apply(spec, cores, x, contract)
    for a, b in zip(gradients(got, operands), gradients(want, operands), strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3], SPECS[4], SPECS[7]], ids=repr)
def test_first_and_second_derivatives_against_finite_differences(
    spec: TTSpec, limit: int | None
) -> None:
    small = spec.with_ranks(tuple(min(rank, 2) for rank in spec.ranks))
    planned = contractions(small, memory_limit=limit)["columns"]
    operands = (draw_x(small, "columns", (2,)), *draw_cores(small))

    def run(x: Tensor, *cores: Tensor) -> Tensor:
        return planned(x, cores)

    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)
    for frozen in range(len(operands)):  # one at a time
        some = [t.detach().requires_grad_(k == frozen) for k, t in enumerate(operands)]
        assert torch.autograd.gradcheck(run, some, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, some, fast_mode=True)


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3], SPECS[4], SPECS[7]], ids=repr)
def test_second_derivatives_are_right_or_refused_whatever_is_frozen(
    spec: TTSpec, limit: int | None
) -> None:
    """Where the plan keeps no input, those of several operands cannot be had, and none is wrong."""
    small = spec.with_ranks(tuple(min(rank, 2) for rank in spec.ranks))
    planned = contractions(small, memory_limit=limit)["columns"]
    operands = (draw_x(small, "columns", (2,)), *draw_cores(small))
    refused, right = [], 0
    for wanted in itertools.product((False, True), repeat=len(operands)):
        if not any(wanted):
            continue
        some = [t.detach().requires_grad_(w) for t, w in zip(operands, wanted, strict=True)]
        asked = [t for t in some if t.requires_grad]

        def twice(y: Tensor, asked: list[Tensor] = asked) -> list[Tensor]:
            dy = y.detach().cos().requires_grad_()
            once = torch.autograd.grad(y, asked, dy, create_graph=True)
            total = sum(g.pow(2).sum() for g in once)
            found = torch.autograd.grad(total, (dy, *asked), allow_unused=True)
            shapes = zip(found, (dy, *asked), strict=True)
            return [torch.zeros_like(t) if g is None else g for g, t in shapes]

        want = twice(interpret.apply(small, some[1:], some[0]))
        try:
            got = twice(planned(some[0], some[1:]))
        except RuntimeError as error:
            refused.append(str(error))
            continue
        right += 1
        for a, b in zip(got, want, strict=True):
            close(a, b)
    assert right >= len(operands) + 1
    assert len(refused) < right
    assert all("no second derivatives" in text for text in refused)


def test_third_derivatives() -> None:
    spec = TTSpec((2, 3), (3, 2), (2,))
    planned, cores = contractions(spec)["columns"], draw_cores(spec)
    x = draw_x(spec, "columns", (2,))

    def third(y: Tensor) -> Tensor:
        (one,) = torch.autograd.grad(y.pow(3).sum(), cores[0], create_graph=True)
        (two,) = torch.autograd.grad(one.pow(2).sum(), cores[1], create_graph=True)
        return torch.autograd.grad(two.pow(2).sum(), x)[0]

    close(third(planned(x, cores)), third(interpret.apply(spec, cores, x)))


# ------------------------------------------------------------------------------- among other things


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "spec", [pytest.param(SPECS[2], marks=pytest.mark.slow), SPECS[7]], ids=repr
)
def test_it_compiles_without_a_graph_break(spec: TTSpec, dynamic: bool) -> None:
    torch._dynamo.reset()
    planned, cores = contractions(spec)["columns"], draw_cores(spec, torch.float32)
    compiled = torch.compile(
        lambda x, *cores: planned(x, cores).sin(), fullgraph=True, dynamic=dynamic,
        backend="aot_eager",
    )  # fmt: skip
    for rows in (2, 5, 33):
        x = draw_x(spec, "columns", (rows,), torch.float32)
        got, want = compiled(x, *cores), planned(x, cores).sin()
        close(got, want, 1e-5)
        for a, b in zip(gradients(got, (x, *cores)), gradients(want, (x, *cores)), strict=True):
            close(a, b, 1e-4)


def test_autocast_gives_and_saves_the_narrow_dtype() -> None:
    spec = TTSpec((8, 9), (10, 8), (3,))
    planned, cores = contractions(spec)["columns"], draw_cores(spec, torch.float32)
    x = draw_x(spec, "columns", (7,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = planned(x, cores)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().square().sum(), (x, *cores))
    want = torch.autograd.grad(interpret.apply(spec, cores, x).square().sum(), (x, *cores))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02


def test_functions_of_functions_see_torch_operations() -> None:
    spec = SPECS[4]
    planned, cores = contractions(spec)["columns"], draw_cores(spec)
    x = draw_x(spec, "columns", (4,))
    want = interpret.apply(spec, cores, x)
    close(torch.func.vmap(lambda row: planned(row, cores))(x), want)
    _, push = torch.func.jvp(lambda x: planned(x, cores), (x,), (x,))
    close(push, want)
    nested = torch.func.grad(
        lambda x: torch.func.grad(lambda c: planned(x, [c, *cores[1:]]).sum())(cores[0]).sum()
    )
    (first,) = torch.autograd.grad(
        interpret.apply(spec, cores, x).sum(), cores[0], create_graph=True
    )
    close(nested(x), torch.autograd.grad(first.sum(), x)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        close(torch.autograd.forward_ad.unpack_dual(planned(dual, cores)).tangent, want)


def test_without_gradients_the_plain_contraction_runs() -> None:
    planned, cores = contractions(SPECS[1])["columns"], draw_cores(SPECS[1])
    x = draw_x(SPECS[1], "columns", (4,))
    with torch.no_grad():
        assert planned(x, cores).grad_fn is None
    with torch.inference_mode():
        close(planned(x, cores), interpret.apply(SPECS[1], cores, x))
    assert planned(x.detach(), [core.detach() for core in cores]).grad_fn is None


def test_checkpointing_around_it() -> None:
    planned, cores = contractions(SPECS[1])["columns"], draw_cores(SPECS[1])
    x = draw_x(SPECS[1], "columns", (4,))
    y = torch.utils.checkpoint.checkpoint(lambda x: planned(x, cores), x, use_reentrant=False)
    for a, b in zip(
        gradients(y, (x, *cores)), gradients(planned(x, cores), (x, *cores)), strict=True
    ):
        assert torch.equal(a, b)
