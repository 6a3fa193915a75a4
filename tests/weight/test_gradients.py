"""Contractions with gradients: right ones of every order, whatever is frozen or computed again."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tensorize.formats import interpret
from tensorize.ir.spec import TTSpec
from tensorize.weight.contractions import contractions
from tests.marks import slow
from tests.passes.orders.test_by_flops import blocks, specs
from tests.weight.contraction_cases import (
    SIDES,
    SPECS,
    chosen,
    close,
    draw_cores,
    draw_x,
    gradients,
    in_use,
    quick,
    wanted_of,
)

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
def test_second_derivatives_are_right_whatever_is_frozen(spec: TTSpec, limit: int | None) -> None:
    small = spec.with_ranks(tuple(min(rank, 2) for rank in spec.ranks))
    planned = contractions(small, memory_limit=limit)["columns"]
    operands = (draw_x(small, "columns", (2,)), *draw_cores(small))
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
        for a, b in zip(twice(planned(some[0], some[1:])), want, strict=True):
            close(a, b)


@pytest.mark.parametrize("limit", [None, 0])
def test_third_derivatives(limit: int | None) -> None:
    spec = TTSpec((2, 3), (3, 2), (2,))
    planned, cores = contractions(spec, memory_limit=limit)["columns"], draw_cores(spec)
    x = draw_x(spec, "columns", (2,))

    def third(y: Tensor) -> Tensor:
        (one,) = torch.autograd.grad(y.pow(3).sum(), cores[0], create_graph=True)
        (two,) = torch.autograd.grad(one.pow(2).sum(), cores[1], create_graph=True)
        return torch.autograd.grad(two.pow(2).sum(), x)[0]

    close(third(planned(x, cores)), third(interpret.apply(spec, cores, x)))


# ------------------------------------------------------------------------------- among other things


@pytest.mark.parametrize("dynamic", [slow(False), True])
@pytest.mark.parametrize("spec", [slow(SPECS[2]), SPECS[7]], ids=repr)
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
