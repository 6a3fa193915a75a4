"""Training plans: never worse than autograd, as priced from the definition."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorize.ir.orders import ContractionPlan, TrainingPiece, TrainingPlan, Tree
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import plan_contraction
from tensorize.passes.orders.gradients import plan_training
from tests.passes.orders.test_by_flops import blocks, operands_of, specs, trees
from tests.passes.orders.training_cases import SIDES, chosen, in_use, quick, realistic, wanted_of

BATCHES = (1, 2, 3, 17, 256, 4096, 10**6)
Names = dict[int | str, set[str]]


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
