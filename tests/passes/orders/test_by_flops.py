"""Contraction orders: exact against enumeration, never above opt_einsum, exact breakpoints."""

from __future__ import annotations

import itertools
import math
import random
import time
import timeit
from collections.abc import Iterator

import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorize.base.errors import BudgetError
from tensorize.ir.orders import ContractionPlan, Tree
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import MAX_CORES, plan_contraction
from tensorize.weight.contractions import contractions

SIDES = ("columns", "rows")
BATCHES = (1, 2, 3, 5, 16, 17, 256, 4096, 10**6)

quick = settings(max_examples=40, deadline=None, derandomize=True)


# ------------------------------------------------------------- the exhaustive search, as an oracle


def operands_of(spec: TTSpec, contract: str) -> tuple[dict[int | str, set[str]], set[str]]:
    """Index names of every operand, and of the output."""
    inner, outer = (spec.columns, spec.rows) if contract == "columns" else (spec.rows, spec.columns)
    operands: dict[int | str, set[str]] = {k: set(core) for k, core in enumerate(spec.cores)}
    operands["x"] = {*spec.batch, "B", *inner}
    return operands, {*spec.batch, "B", *outer}


def trees(leaves: tuple[int | str, ...]) -> Iterator[Tree]:
    """Every contraction tree: each way to halve the leaves, and so on."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    head, *tail = leaves
    for size in range(len(tail)):
        for chosen in itertools.combinations(tail, size):
            others = tuple(leaf for leaf in tail if leaf not in chosen)
            for left in trees((head, *chosen)):
                for right in trees(others):
                    yield (left, right)


def leaves_of(tree: Tree) -> set[int | str]:
    return leaves_of(tree[0]) | leaves_of(tree[1]) if isinstance(tree, tuple) else {tree}


def price(spec: TTSpec, contract: str, tree: Tree, batch: int) -> tuple[int, int]:
    """FLOPs and peak elements of one tree, from the definition."""
    operands, output = operands_of(spec, contract)
    size = {**spec.size, "B": batch}
    peak = 0

    def visit(node: Tree) -> tuple[set[str], int]:
        nonlocal peak
        if not isinstance(node, tuple):
            return operands[node], 0
        (left, left_cost), (right, right_cost) = visit(node[0]), visit(node[1])
        inside = leaves_of(node)
        outside = output.union(*(names for leaf, names in operands.items() if leaf not in inside))
        joint, kept = left | right, (left | right) & outside
        peak = max(peak, math.prod(size[name] for name in kept))
        factor = 2 if joint - kept else 1
        flops = factor * math.prod(size[name] for name in joint)
        return kept, left_cost + right_cost + flops

    _, flops = visit(tree)
    return flops, peak


def all_prices(spec: TTSpec, contract: str, batch: int) -> list[tuple[int, int]]:
    leaves = ("x", *range(len(spec.cores)))
    return [price(spec, contract, tree, batch) for tree in trees(leaves)]


@st.composite
def specs(draw: st.DrawFn, most: int = 4) -> TTSpec:
    count = draw(st.integers(1, most))
    sizes = st.sampled_from([1, 2, 3, 4, 7, 16])
    modes = st.lists(sizes, min_size=count, max_size=count)
    ranks = draw(st.lists(sizes, min_size=count - 1, max_size=count - 1))
    return TTSpec(draw(modes), draw(modes), ranks, experts=draw(st.sampled_from([0, 0, 3])))


@st.composite
def blocks(draw: st.DrawFn) -> TTSpec:
    sizes = st.sampled_from([1, 2, 3, 4, 7, 16])
    modes = st.tuples(sizes, sizes)
    rank, experts = draw(sizes), draw(st.sampled_from([0, 0, 1, 3]))
    return TTSpec.block(draw(modes), draw(modes), rank, experts=experts)


# --------------------------------------------------------------------------------- the best order


@quick
@given(specs() | blocks(), st.sampled_from(SIDES))
def test_no_tree_at_all_is_cheaper(spec: TTSpec, contract: str) -> None:
    plan = plan_contraction(spec, contract)
    for batch in {*BATCHES, *plan.breakpoints, *(b - 1 for b in plan.breakpoints)}:
        assert plan.flops(batch) == min(all_prices(spec, contract, batch))[0]


@quick
@given(specs() | blocks(), st.sampled_from(SIDES))
def test_every_piece_says_what_its_tree_costs(spec: TTSpec, contract: str) -> None:
    plan = plan_contraction(spec, contract)
    for piece in plan.pieces:
        assert leaves_of(piece.tree) == {"x", *range(len(spec.cores))}
        for batch in (piece.first_batch, piece.last_batch or piece.first_batch + 10**6):
            expected = price(spec, contract, piece.tree, batch)
            assert (plan.flops(batch), plan.peak_elements(batch)) == expected


def some_specs() -> list[TTSpec]:
    """Realistic shapes, and random ones, of up to six cores."""
    generator = random.Random(0)
    drawn = [
        TTSpec(
            [generator.choice([1, 2, 4, 8]) for _ in range(count)],
            [generator.choice([1, 2, 4, 8]) for _ in range(count)],
            [generator.choice([1, 4, 16, 37]) for _ in range(count - 1)],
        )
        for count in (4, 5, 5, 6, 6)
    ]
    return [
        TTSpec.low_rank(768, 3072, 64),
        TTSpec.low_rank(64, 256, 16, experts=8),
        TTSpec((24, 32), (48, 64), (60,)),
        TTSpec((16, 16, 16), (16, 16, 16), (32, 32)),
        TTSpec((8, 8, 8, 8), (8, 8, 8, 8), (16, 32, 16)),
        TTSpec((4,) * 6, (4,) * 6, (8,) * 5),
        TTSpec.block((64, 4), (8, 96), 12),
        *drawn,
    ]


@pytest.mark.parametrize("spec", some_specs(), ids=repr)
@pytest.mark.parametrize("contract", SIDES)
def test_never_above_opt_einsum(spec: TTSpec, contract: str) -> None:
    operands, output = operands_of(spec, contract)
    names = sorted(set().union(*operands.values()))
    letters = {name: opt_einsum.get_symbol(k) for k, name in enumerate(names)}
    equation = ",".join("".join(letters[n] for n in sorted(o)) for o in operands.values())
    equation += "->" + "".join(letters[name] for name in sorted(output))
    plan = plan_contraction(spec, contract)
    for batch in (1, 2, 16, 256, 4096):
        size = {**spec.size, "B": batch}
        shapes = [tuple(size[name] for name in sorted(o)) for o in operands.values()]
        _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
        assert plan.flops(batch) <= info.opt_cost


# ----------------------------------------------------------------------------------- the envelope


@quick
@given(specs(most=5), st.sampled_from(SIDES))
def test_the_pieces_are_a_concave_envelope_with_exact_breakpoints(
    spec: TTSpec, contract: str
) -> None:
    pieces = plan_contraction(spec, contract).pieces
    assert pieces[0].first_batch == 1
    assert pieces[-1].last_batch is None
    for before, after in itertools.pairwise(pieces):
        assert before.last_batch == after.first_batch - 1
        assert before.slope > after.slope
        assert before.constant < after.constant
        turn = after.first_batch
        assert after.flops(turn) < before.flops(turn)
        assert after.flops(turn - 1) >= before.flops(turn - 1)


@quick
@given(specs(), st.sampled_from(SIDES))
def test_the_expression_is_the_flops(spec: TTSpec, contract: str) -> None:
    plan = plan_contraction(spec, contract)
    symbols = plan.expression.free_symbols
    for batch in {*BATCHES, *plan.breakpoints}:
        value = plan.expression.subs(dict.fromkeys(symbols, batch))
        assert value == plan.flops(batch)


def test_low_rank_goes_through_the_rank() -> None:
    plan = plan_contraction(TTSpec.low_rank(768, 3072, 64))
    (piece,) = plan.pieces
    assert piece.tree == (("x", 1), 0)
    assert (piece.constant, piece.slope) == (0, 2 * 64 * (768 + 3072))
    (piece,) = plan_contraction(TTSpec.low_rank(768, 3072, 64), "rows").pieces
    assert piece.tree == (("x", 0), 1)


def test_a_large_batch_pays_for_rebuilding_the_weight() -> None:
    plan = plan_contraction(TTSpec((16, 16, 16), (16, 16, 16), (32, 32)))
    assert plan.pieces[-1].tree == ("x", ((0, 1), 2))
    assert plan.pieces[-1].slope == 2 * 4096 * 4096
    assert plan.pieces[-1].peak_constant == 4096 * 4096


def test_of_orders_with_the_same_line_the_smaller_peak_is_taken() -> None:
    """The first core is a vector over r1=3: x meets it first (12 elements) or last (6)."""
    spec = TTSpec((1, 2), (1, 4), (3,))
    plan = plan_contraction(spec)
    for tree, peak in (((("x", 0), 1), 12), ((("x", 1), 0), 6)):
        assert price(spec, "columns", tree, 1) == (plan.flops(1), peak)
        assert price(spec, "columns", tree, 9)[0] == plan.pieces[0].flops(9)
    assert plan.pieces[0].tree == (("x", 1), 0)
    assert plan.peak_elements(1) == 6


def test_the_table_reads_like_this() -> None:
    assert str(plan_contraction(TTSpec((16, 16, 16), (16, 16, 16), (32, 32)))) == TABLE


TABLE = """\
contraction of TTSpec((16, 16, 16), (16, 16, 16), (32, 32)) with its columns
           batch                         FLOPs           peak elements  order
             1-1               0 + 142606336 B        max(0, 131072 B)  ((('x', 0), 1), 2)
            2-28        134217728 + 71303168 B  max(2097152, 131072 B)  (('x', (0, 1)), 2)
          29-...       1207959552 + 33554432 B   max(16777216, 4096 B)  ('x', ((0, 1), 2))"""


def test_six_cores_are_planned_in_20_milliseconds() -> None:
    """The quickest of some, as other processes only make it slower; kept plans take nothing."""
    spec = TTSpec((4, 3, 4, 2, 4, 3), (3, 4, 2, 4, 3, 4), (5, 7, 9, 8, 6))

    def plan() -> object:
        return plan_contraction.__wrapped__(spec)

    assert min(timeit.repeat(plan, time.process_time, number=1, repeat=5)) < 0.02


def test_plans_are_made_once_and_are_equal_when_made_twice() -> None:
    spec = TTSpec((4, 4), (4, 4), (3,))
    assert plan_contraction(spec) is plan_contraction(TTSpec((4, 4), (4, 4), (3,)))
    again = plan_contraction.__wrapped__(spec)
    assert again == plan_contraction(spec)
    assert hash(again) == hash(plan_contraction(spec))


# -------------------------------------------------------------------------------- the memory limit


def expected_under_limit(spec: TTSpec, contract: str, batch: int, limit: int) -> tuple[int, int]:
    """(FLOPs, -) of the cheapest tree that fits, or (FLOPs, peak) of the smallest that does not."""
    prices = all_prices(spec, contract, batch)
    fitting = [flops for flops, peak in prices if peak <= limit]
    if fitting:
        return min(fitting), limit
    peak, flops = min((peak, flops) for flops, peak in prices)
    return flops, peak


@quick
@given(specs(most=3) | blocks(), st.sampled_from(SIDES), st.sampled_from([8, 50, 300, 2000, 10**5]))
def test_the_cheapest_that_fits_at_every_batch(spec: TTSpec, contract: str, limit: int) -> None:
    smallest = min(peak for _, peak in all_prices(spec, contract, 1))
    if smallest > limit:
        with pytest.raises(BudgetError, match=f"is {smallest}"):
            plan_contraction(spec, contract, memory_limit=limit)
        return
    plan = plan_contraction(spec, contract, memory_limit=limit)
    assert covers_every_batch(plan)
    turns = {*plan.breakpoints, *(b - 1 for b in plan.breakpoints)}
    for batch in {*range(1, 20), *BATCHES, *turns}:
        flops, peak = expected_under_limit(spec, contract, batch, limit)
        assert plan.flops(batch) == flops
        assert plan.peak_elements(batch) <= peak


def covers_every_batch(plan: ContractionPlan) -> bool:
    first, last = plan.pieces[0], plan.pieces[-1]
    joined = all(a.last_batch == b.first_batch - 1 for a, b in itertools.pairwise(plan.pieces))
    return first.first_batch == 1 and last.last_batch is None and joined


def test_a_limit_that_never_binds_changes_nothing_while_it_does_not() -> None:
    spec = TTSpec((16, 16, 16), (16, 16, 16), (32, 32))
    free, limited = plan_contraction(spec), plan_contraction(spec, memory_limit=10**12)
    for batch in BATCHES:
        assert limited.flops(batch) == free.flops(batch)


def test_a_limit_below_the_weight_forbids_rebuilding_it() -> None:
    spec = TTSpec((16, 16, 16), (16, 16, 16), (32, 32))
    limit = 4096 * 4096 - 1
    plan = plan_contraction(spec, memory_limit=limit)
    reach = limit // 131072  # the largest intermediate of the other orders has 131072 B elements
    assert plan.peak_elements(reach) <= limit
    assert plan.piece(reach).tree == (("x", (0, 1)), 2)


# --------------------------------------------------------------------------------------- refusals


def test_a_limit_below_every_peak_names_the_smallest_possible_one() -> None:
    with pytest.raises(BudgetError, match=r"within 700 elements.*for one row, is 768") as caught:
        plan_contraction(TTSpec.low_rank(768, 3072, 64), memory_limit=700)
    assert "at least 768" in str(caught.value)


def test_sides_and_lengths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="'columns' or 'rows'"):
        plan_contraction(TTSpec.low_rank(4, 4, 2), "lookup")
    count = MAX_CORES + 1
    with pytest.raises(ValueError, match=f"up to {MAX_CORES} cores"):
        contractions(TTSpec((2,) * count, (2,) * count, (2,) * (count - 1)))
    with pytest.raises(ValueError, match=f"up to {MAX_CORES} cores"):
        plan_contraction(TTSpec((2,) * count, (2,) * count, (2,) * (count - 1)))
