"""Training plans: never worse than autograd, right gradients, what is saved is what they say."""

from __future__ import annotations

import copy
import functools
import itertools
import math
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
from tensorize.codegen.aten import gradients as training
from tensorize.codegen.machine import rates
from tensorize.ir.orders import (
    ContractionPlan,
    TrainingPiece,
    TrainingPlan,
    Tree,
)
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import plan_contraction
from tensorize.passes.orders.by_time import timed_plan
from tensorize.passes.orders.gradients import plan_training
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import limit_saved
from tests.passes.orders.test_by_flops import (
    blocks,
    operands_of,
    specs,
    trees,
)

SIDES = ("columns", "rows")
BATCHES = (1, 2, 3, 17, 256, 4096, 10**6)
Names = dict[int | str, set[str]]

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


# --------------------------------------------------- plain autograd and plans, from the definition


def priced(
    spec: TTSpec, operands: Names, left: set, right: set, batch: int
) -> tuple[set, int, set]:
    """One product of two values (sets of operands): its operands, FLOPs and open indices."""

    def open_of(inside: set) -> set[str]:
        if len(inside) == 1:
            return operands[next(iter(inside))]
        names = set().union(*(operands[o] for o in inside))
        return names & set().union(*(operands[o] for o in operands if o not in inside))

    size = {**spec.size, "B": batch}
    joint, kept = open_of(left) | open_of(right), open_of(left | right)
    flops = math.prod(size[name] for name in joint) * (2 if joint - kept else 1)
    return left | right, flops, kept


def network(spec: TTSpec, contract: str) -> Names:
    operands, output = operands_of(spec, contract)
    return {**operands, "g": output}


def autograd_prices(
    spec: TTSpec, contract: str, tree: Tree, wanted: Sequence[int | str], batch: int
) -> tuple[int, int]:
    """FLOPs of both passes and saved elements of plain reverse mode, product by product.

    A product is differentiated by each side that holds a wanted operand; for that the other side is
    saved, unless it is a core.
    """
    operands = network(spec, contract)
    size = {**spec.size, "B": batch}
    flops, saved = 0, {}

    def visit(node: Tree) -> tuple[set, set[str]]:
        nonlocal flops
        if not isinstance(node, tuple):
            return {node}, operands[node]
        sides = [visit(child) for child in node]
        inside, cost, kept = priced(spec, operands, sides[0][0], sides[1][0], batch)
        flops += cost
        for (own, _), (other, names) in (sides, sides[::-1]):
            if own & set(wanted):  # the gradient of this side is that of the product by the other
                around = set(operands) - inside
                _, cost, _ = priced(spec, operands, around, other, batch)
                flops += cost
                if len(other) > 1 or other == {"x"}:
                    saved[frozenset(other)] = math.prod(size[name] for name in names)
        return inside, kept

    visit(tree)
    return flops, sum(saved.values())


def plan_prices(plan: TrainingPlan, piece: TrainingPiece, batch: int) -> tuple[int, int]:
    """FLOPs and saved elements of a piece, from its steps."""
    spec, operands = plan.spec, network(plan.spec, plan.contract)
    size = {**spec.size, "B": batch}
    known: dict[int | str, set] = {operand: {operand} for operand in operands}
    flops = 0

    def visit(node: Tree) -> set:
        nonlocal flops
        if not isinstance(node, tuple):
            return known[node]
        inside, cost, _ = priced(spec, operands, visit(node[0]), visit(node[1]), batch)
        flops += cost
        return inside

    def run(steps: Sequence[Any]) -> dict[str, Any]:
        for step in steps:
            known[step.name] = visit(step.tree)
            names = set(step.axes)
            assert names == priced_open(operands, known[step.name])
        return {step.name: step for step in steps}

    made = run(piece.forward)
    assert known["y"] == set(operands) - {"g"}
    saved = sum(
        math.prod(size[a] for a in (operands["x"] if name == "x" else made[name].axes))
        for name in piece.saved
    )
    run(piece.backward)
    for operand in plan.gradients:
        assert known[f"d{operand}"] == set(operands) - {operand}
    return flops, saved


def priced_open(operands: Names, inside: set) -> set[str]:
    names = set().union(*(operands[o] for o in inside))
    return names & set().union(*(operands[o] for o in operands if o not in inside))


def check_against_autograd(
    plan: TrainingPlan, limit: int | None = None, forward: ContractionPlan | None = None
) -> None:
    forward = forward or plan_contraction(plan.spec, plan.contract)
    turns = {*plan.breakpoints, *forward.breakpoints}
    for batch in {*BATCHES, *turns, *(b - 1 for b in turns)}:
        tree = forward.piece(batch).tree
        flops, saved = autograd_prices(plan.spec, plan.contract, tree, plan.gradients, batch)
        own = plan_prices(plan, plan.piece(batch), batch)
        assert own == (plan.flops(batch), plan.saved_elements(batch))
        assert own[1] <= saved
        if limit is None or saved <= limit:
            assert own[0] <= flops


wanted_of = st.lists(st.booleans(), min_size=5, max_size=5)


def chosen(spec: TTSpec, flags: list[bool]) -> tuple[int | str, ...]:
    operands = ("x", *range(len(spec.cores)))
    return tuple(o for o, flag in zip(operands, flags, strict=False) if flag) or operands


@quick
@given(specs() | blocks(), st.sampled_from(SIDES), wanted_of)
def test_never_worse_than_autograd(spec: TTSpec, contract: str, flags: list[bool]) -> None:
    check_against_autograd(plan_training(spec, contract, gradients=chosen(spec, flags)))


@quick
@given(specs(3) | blocks(), st.sampled_from(SIDES), wanted_of, st.sampled_from([0, 20, 300, 10**4]))
def test_a_limit_is_kept_wherever_it_can_be(
    spec: TTSpec, contract: str, flags: list[bool], limit: int
) -> None:
    gradients = chosen(spec, flags)
    plan = plan_training(spec, contract, gradients=gradients, memory_limit=limit)
    check_against_autograd(plan, limit)
    free = plan_training(spec, contract, gradients=gradients)
    least = plan_training(spec, contract, gradients=gradients, memory_limit=0)
    for batch in BATCHES:
        assert plan.saved_elements(batch) <= max(limit, least.saved_elements(batch))
        assert free.flops(batch) <= plan.flops(batch)
        # Nothing but the input is ever needed.
        x = math.prod({**spec.size, "B": batch}[a] for a in network(spec, contract)["x"])
        assert least.saved_elements(batch) <= x


def in_use(spec: TTSpec, contract: str = "columns") -> ContractionPlan:
    """The orders that run, by predicted time."""
    return timed_plan(spec, contract, rates.current())


@quick
@given(specs() | blocks(), st.sampled_from(SIDES), wanted_of, st.sampled_from([None, 0, 500]))
def test_the_orders_in_use_are_kept_and_are_no_worse_than_autograd_through_them(
    spec: TTSpec, contract: str, flags: list[bool], limit: int | None
) -> None:
    forward = in_use(spec, contract)
    gradients = chosen(spec, flags)
    plan = plan_training(spec, contract, gradients=gradients, memory_limit=limit, forward=forward)
    check_against_autograd(plan, limit, forward)
    if limit is None:
        assert plan.breakpoints == forward.breakpoints
    for before, after in itertools.pairwise(plan.pieces):
        assert before.last_batch == after.first_batch - 1
    assert plan.pieces[0].first_batch == 1
    assert plan.pieces[-1].last_batch is None


def realistic() -> list[TTSpec]:
    return [
        TTSpec.low_rank(768, 3072, 64),
        TTSpec((24, 32), (48, 64), (60,)),
        TTSpec((16, 16, 16), (16, 16, 16), (32, 32)),
        TTSpec((8, 8, 8, 8), (8, 8, 8, 8), (16, 32, 16)),
        TTSpec.block((64, 16), (16, 64), 8),
        TTSpec.block((48, 16), (8, 384), 24),
    ]


@pytest.mark.parametrize("spec", realistic(), ids=repr)
def test_a_limit_saves_strictly_less_than_autograd(spec: TTSpec) -> None:
    plan, forward = plan_training(spec, memory_limit=0), plan_contraction(spec)
    for batch in (1, 16, 256, 4096):
        operands = ("x", *range(len(spec.cores)))
        _, saved = autograd_prices(spec, "columns", forward.piece(batch).tree, operands, batch)
        assert plan.saved_elements(batch) < saved


@functools.lru_cache
def two_core_ways(spec: TTSpec, contract: str) -> list[tuple[tuple[int, int], ...]]:
    """FLOPs and saved elements, at some batches, of every way to train two cores.

    A forward tree, a choice of what is saved, and one of three products for each gradient.
    """
    operands = network(spec, contract)
    everything = frozenset(operands)
    batches = (1, 7, 64, 1000)
    found = []
    for tree in trees(("x", 0, 1)):
        inner = next(child for child in tree if isinstance(child, tuple))
        pair = frozenset(inner)
        (last,) = everything - {"g"} - pair
        for kept in (True, False):
            ways = [
                [frozenset(p) for p in itertools.combinations(sorted(everything - {t}, key=str), 2)]
                for t in ("x", 0, 1)
            ]
            for choice in itertools.product(*ways):
                figures = []
                for batch in batches:
                    size = {**spec.size, "B": batch}
                    cost = priced(spec, operands, set(pair), {last}, batch)[1]
                    cost += priced(spec, operands, *({o} for o in pair), batch)[1]
                    used = set(choice)
                    saved, reads_x = 0, False
                    for target, part in zip(("x", 0, 1), choice, strict=True):
                        rest = everything - {target} - part
                        cost += priced(spec, operands, set(part), set(rest), batch)[1]
                        reads_x |= "x" in rest
                    for part in used:
                        if kept and part == pair:
                            kept_names = priced_open(operands, set(part))
                            saved += math.prod(size[name] for name in kept_names)
                        else:
                            cost += priced(spec, operands, *({o} for o in part), batch)[1]
                            reads_x |= "x" in part
                    if reads_x:
                        saved += math.prod(size[name] for name in operands["x"])
                    figures.append((cost, saved))
                found.append(tuple(figures))
    return found


@quick
@given(specs(2).filter(lambda s: len(s.cores) == 2) | blocks(), st.sampled_from(SIDES))
def test_two_cores_are_as_good_as_every_way_there_is(spec: TTSpec, contract: str) -> None:
    ways = two_core_ways(spec, contract)
    forward = plan_contraction(spec, contract)
    for limit in (None, 0):
        plan = plan_training(spec, contract, memory_limit=limit)
        for k, batch in enumerate((1, 7, 64, 1000)):
            tree = forward.piece(batch).tree
            most = autograd_prices(spec, contract, tree, ("x", 0, 1), batch)[1]
            if limit == 0:
                most = min(way[k][1] for way in ways)
                assert plan.saved_elements(batch) == most
            assert plan.flops(batch) == min(way[k][0] for way in ways if way[k][1] <= most)


def test_pieces_follow_each_other() -> None:
    for spec, limit in itertools.product(realistic(), (None, 0, 10**6)):
        pieces = plan_training(spec, memory_limit=limit).pieces
        assert pieces[0].first_batch == 1
        assert pieces[-1].last_batch is None
        for before, after in itertools.pairwise(pieces):
            assert before.last_batch == after.first_batch - 1


def test_many_cores_are_planned_without_a_search() -> None:
    spec = TTSpec((2,) * 8, (2,) * 8, (3,) * 7)
    plan = plan_training(spec)
    check_against_autograd(plan)
    assert plan_training(spec, memory_limit=0).saved_elements(64) < plan.saved_elements(64)


def test_what_makes_no_sense_is_refused() -> None:
    spec = TTSpec((2, 3), (3, 2), (2,))
    with pytest.raises(ValueError, match="gradients are of some of"):
        plan_training(spec, gradients=())
    with pytest.raises(ValueError, match="gradients are of some of"):
        plan_training(spec, gradients=("x", 2))
    with pytest.raises(ValueError, match="'columns' or 'rows'"):
        plan_training(spec, "lookup")


def test_the_table_reads_like_this() -> None:
    assert str(plan_training(TTSpec.low_rank(768, 3072, 64), memory_limit=0)) == TABLE


TABLE = """\
training of TTSpec((768, 1), (1, 3072), (64,)) with its columns: gradients of x, core 0, core 1
batch 1–…: 0 + 1867776 B FLOPs, 0 + 3072 B elements saved (x)
   forward  y = (('x', 1), 0)
  backward  s0 = ('g', 0)
  backward  dx = ('s0', 1)
  backward  d0 = ('g', ('x', 1))
  backward  d1 = ('s0', 'x')"""


# ------------------------------------------------------------------------------------ emitted text


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


# ----------------------------------------------------------------------------------- what is saved


def saved_by(run: Any, cores: Sequence[Tensor]) -> int:
    """Elements that autograd keeps for the backward pass, parameters left out; each memory once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if all(tensor.data_ptr() != core.data_ptr() for core in cores):
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", [*SPECS[1:], TTSpec.low_rank(12, 20, 5)], ids=repr)
def test_saved_elements_are_those_of_the_plan(
    spec: TTSpec, contract: str, limit: int | None
) -> None:
    if spec.format == "low_rank" and limit is None:
        return
    planned, cores = contractions(spec, memory_limit=limit)[contract], draw_cores(spec)
    forward = in_use(spec, contract)
    plan = plan_training(spec, contract, memory_limit=limit, forward=forward)
    plain = aten.build(forward)
    for batch in (1, 7, 50):
        x = draw_x(spec, contract, (batch,))
        measured = saved_by(functools.partial(planned, x, cores), cores)
        assert measured == plan.saved_elements(batch)
        autograd = saved_by(functools.partial(plain, x, cores), cores)
        assert measured <= autograd
        if limit == 0 and len(spec.cores) > 2:
            assert measured < autograd


def test_frozen_operands_save_and_cost_less() -> None:
    spec = TTSpec((8, 9), (10, 8), (3,))
    planned = contractions(spec)["columns"]
    everything, only_x = plan_training(spec), plan_training(spec, gradients=("x",))
    assert only_x.saved_elements(50) == 0
    assert only_x.flops(50) < everything.flops(50)
    cores = [core.detach() for core in draw_cores(spec)]
    x = draw_x(spec, "columns", (50,))
    assert saved_by(lambda: planned(x, cores), cores) == 0
    (dx,) = gradients(planned(x, cores), (x,))
    close(dx, gradients(interpret.apply(spec, cores, x), (x,))[0])


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
