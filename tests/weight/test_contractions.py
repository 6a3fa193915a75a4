"""Contractions with gradients: the right ones, twice as well, and what is saved for them."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tensorize
from tensorize.algebra import interpret
from tensorize.codegen.aten import emit as aten
from tensorize.codegen.machine import rates
from tensorize.ir.orders import (
    ContractionPlan,
)
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_time import timed_plan
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import limit_saved
from tests.passes.orders.test_by_flops import (
    blocks,
    specs,
)

SIDES = ("columns", "rows")

SPECS = [
    TTSpec((6,), (5,), ()),
    TTSpec((8, 9), (10, 8), (3,)),
    TTSpec((8, 9), (10, 8), (60,)),
    TTSpec((2, 3), (3, 2), (2,), experts=2),
    TTSpec((4, 3, 8), (8, 2, 4), (6, 5)),
    TTSpec((2, 3, 2, 3), (3, 2, 3, 2), (4, 6, 4)),
    TTSpec((1, 4, 1), (3, 1, 3), (2, 3)),
    TTSpec.block((3, 4), (5, 2), 2),
    TTSpec.block((8, 9), (10, 8), 3, experts=2),
    TTSpec.block((1, 5), (1, 4), 2),
]

quick = settings(max_examples=30, deadline=None, derandomize=True)


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [draw(s, k, dtype).requires_grad_() for k, s in enumerate(spec.core_shapes)]


def draw_x(spec: TTSpec, contract: str, lead: Sequence[int], dtype=torch.float64) -> Tensor:
    features = spec.shape[-1] if contract == "columns" else spec.shape[-2]
    return draw((*spec.shape[:-2], *lead, features), 99, dtype).requires_grad_()


def close(got: Tensor | None, want: Tensor | None, eps: float = 1e-11) -> None:
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    if want.numel():
        assert float((got - want).abs().max()) <= eps * max(1.0, float(want.abs().max()))


wanted_of = st.lists(st.booleans(), min_size=5, max_size=5)


def chosen(spec: TTSpec, flags: list[bool]) -> tuple[int | str, ...]:
    operands = ("x", *range(len(spec.cores)))
    return tuple(o for o, flag in zip(operands, flags, strict=False) if flag) or operands


def in_use(spec: TTSpec, contract: str = "columns") -> ContractionPlan:
    """The orders that run, by predicted time."""
    return timed_plan(spec, contract, rates.current())


# --------------------------------------------------------------------------------------- gradients


def gradients(y: Tensor, operands: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, operands, draw(y.shape, seed, y.dtype))


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


# ----------------------------------------------------------------------------------- what is saved


def saved_by(run: Any, cores: Sequence[Tensor]) -> int:
    """Elements that autograd keeps for the backward pass, parameters left out; each memory once."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    own = {core.untyped_storage().data_ptr() for core in cores}
    return sum(t.untyped_storage().nbytes() // t.itemsize for k, t in seen.items() if k not in own)


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", [*SPECS[1:], TTSpec.low_rank(12, 20, 5)], ids=repr)
def test_a_limit_is_kept_wherever_it_can_be(spec: TTSpec, contract: str) -> None:
    cores, plain = draw_cores(spec), aten.build(in_use(spec, contract))
    for batch in (1, 7, 50):
        x = draw_x(spec, contract, (batch,))
        autograd = saved_by(functools.partial(plain, x, cores), cores)
        for limit in (0, x.numel(), autograd - 1, autograd, 10**9):
            limited = contractions(spec, memory_limit=limit)[contract]
            measured = saved_by(functools.partial(limited, x, cores), cores)
            assert measured <= max(limit, x.numel())
            assert measured == (autograd if limit >= autograd else x.numel())


@pytest.mark.parametrize("limit", [None, 0])
def test_frozen_cores_save_nothing_of_the_rows(limit: int | None) -> None:
    spec = TTSpec((8, 9), (10, 8), (3,))
    planned = contractions(spec, memory_limit=limit)["columns"]
    cores = [core.detach() for core in draw_cores(spec)]
    few, many = (draw_x(spec, "columns", (rows,)) for rows in (50, 60))
    saved = [saved_by(functools.partial(planned, x, cores), cores) for x in (few, many)]
    assert saved[0] == saved[1]
    (dx,) = gradients(planned(few, cores), (few,))
    close(dx, gradients(interpret.apply(spec, cores, few), (few,))[0])


# ------------------------------------------------------------------------------ among other things


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


# --------------------------------------------------------------------------------- whole modules


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 60), nn.Linear(60, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def small(formats: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 48)
    return tensorize.compile(Two(), 0.5, formats=formats, example_inputs=(x,)), x


def each_saved(model: nn.Module, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    model.zero_grad()
    parameters = list(model.parameters())
    total = saved_by(lambda: model(x), parameters)
    model(x).square().sum().backward()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("formats", ["low_rank", "tt", "block"])
def test_a_model_that_recomputes_saves_less_and_learns_the_same(formats: str) -> None:
    model, x = small(formats)
    before, want = each_saved(model, x)
    limit_saved(model)
    after, got = each_saved(model, x)
    assert after < before
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each_saved(twin, x)[0] == after
    limit_saved(model, None)
    assert each_saved(model, x)[0] == before
    tensorize.densify(model)


def test_recomputing_is_compiled_too() -> None:
    torch._dynamo.reset()
    model, x = small("low_rank")
    limit_saved(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), 1e-5)


def each_module(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, Cores | LowRankLinear))


def test_slices_of_a_packed_weight_ignore_the_limit() -> None:
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    x = torch.randn(2, 5, 24)
    model = tensorize.compile(
        attention, None, ranks={"*": 4}, formats="low_rank", example_inputs=(x, x, x)
    ).train()
    want = model(x, x, x)[0]
    limit_saved(model)
    assert list(each_module(model))
    close(model(x, x, x)[0], want, 1e-6)
