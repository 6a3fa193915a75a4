"""Orders by predicted time, the breakpoints that a model has in common, and timed orders."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.algebra.reconstruct import reconstruct
from tensorize.codegen.aten import emit as aten
from tensorize.codegen.machine import timed_orders
from tensorize.ir.machine import GENERIC
from tensorize.ir.orders import Tree
from tensorize.passes.orders.by_flops import one_order, piece_of, plan_contraction
from tensorize.passes.orders.by_time import (
    BREAKPOINTS,
    GRID,
    all_trees,
    common_breakpoints,
    contenders,
    fastest_trees,
    priced,
    question,
    timed_plan,
)
from tensorize.passes.orders.roofline import tree_times
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tensorize.weight.install import factored
from tests.models import MLP

SPECS = (
    TTSpec((6, 8), (8, 6), (5,)),
    TTSpec((64, 64), (64, 64), (48,)),
    TTSpec((16, 16, 16), (16, 16, 16), (20, 20)),
    TTSpec((4, 4, 4, 4), (4, 4, 4, 4), (4, 8, 4)),
    TTSpec((2, 2, 2, 2, 2), (2, 2, 2, 2, 2), (2, 3, 3, 2)),
)


@pytest.mark.parametrize("count", range(1, 6))
def test_all_trees_are_all_trees(count: int) -> None:
    trees = list(all_trees(("x", *range(count))))
    # (2n - 3)!! ways to pair n operands
    assert len(trees) == math.prod(range(1, 2 * count, 2))
    assert len(set(trees)) == len(trees)


@pytest.mark.parametrize("contract", ["columns", "rows"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_tree_has_the_flops_and_the_peak_that_the_planner_says(
    spec: TTSpec, contract: str
) -> None:
    for piece in plan_contraction(spec, contract).pieces:
        assert piece_of(spec, contract, piece.tree, piece.first_batch, piece.last_batch) == piece


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_fastest_order_is_the_fastest_of_all(spec: TTSpec) -> None:
    trees = list(all_trees(("x", *range(len(spec.cores))))) if len(spec.cores) <= 4 else None
    for batch in (1, 64, 4096):
        (best,) = fastest_trees(spec, "columns", GENERIC, batch, 1)
        times = {
            tree: float(tree_times(GENERIC, batch, spec, "columns", tree, "float32"))
            for tree in trees or [best]
        }
        assert times[best] == min(times.values())


@pytest.mark.parametrize("contract", ["columns", "rows"])
@pytest.mark.parametrize(
    "spec",
    [TTSpec((64, 64), (64, 64), (102,)), TTSpec((16, 16, 16), (16, 16, 16), (102, 102))],
    ids=str,
)
def test_of_two_orders_of_equal_flops_the_one_with_fewer_copies_of_cores_is_taken(
    spec: TTSpec, contract: str
) -> None:
    """The two ends of a train with equal modes cost the same FLOPs, and not the same copies."""

    def copies_of_cores(tree: Tree) -> int:
        text = aten.emit(one_order(spec, contract, tree, 1, 1))
        return sum(f"c{k}.permute" in text for k in range(len(spec.cores)))

    def flops(tree: Tree) -> int:
        return one_order(spec, contract, tree, 1, 1).flops(1)

    best, *others = fastest_trees(spec, contract, GENERIC, 1, 3)
    mirrored = [tree for tree in others if flops(tree) == flops(best)]
    assert mirrored
    assert all(copies_of_cores(tree) > copies_of_cores(best) for tree in mirrored)


def test_more_work_takes_longer_and_a_slower_machine_too() -> None:
    spec = SPECS[1]
    _, times = priced(spec, "columns", GENERIC, "float32")
    assert (times[:, 1:] >= times[:, :-1]).all()
    slow = replace(GENERIC, launch=2 * GENERIC.launch)
    assert (priced(spec, "columns", slow, "float32")[1] > times).all()


def test_the_plan_that_runs_changes_only_at_the_breakpoints() -> None:
    for spec, contract in itertools.product(SPECS, ("columns", "rows")):
        for breakpoints in ((), (5,), (9, 129)):
            plan = timed_plan(spec, contract, GENERIC, breakpoints)
            assert set(plan.breakpoints) <= set(breakpoints)
            assert plan.pieces[0].first_batch == 1
            assert plan.pieces[-1].last_batch is None


def test_what_was_timed_goes_before_predictions_and_each_range_has_its_own_layout() -> None:
    spec, tree = SPECS[1], ("x", (0, 1))
    measured = {
        question(spec, "columns", "float32", 1, 8): (tree, 2),
        question(spec, "columns", "float32", 9, None): (tree, 1),
    }
    plan = timed_plan(spec, "columns", GENERIC, (9,), measured=measured)
    assert [(piece.tree, piece.layout) for piece in plan.pieces] == [(tree, 2), (tree, 1)]


def test_a_model_has_two_breakpoints_at_most_and_none_without_a_gain() -> None:
    uses = [(spec, contract, "float32") for spec in SPECS for contract in ("columns", "rows")]
    assert len(common_breakpoints(uses, GENERIC)) <= 2
    assert common_breakpoints([], GENERIC) == ()
    exact = TTSpec((8,), (8,), ())  # one core: there is one order
    assert common_breakpoints([(exact, "columns", "float32")], GENERIC) == ()


def test_in_a_model_the_order_of_a_weight_is_what_it_is_alone() -> None:
    """So its FLOPs and times are known before those of the others; and near the best there is."""
    slower = []
    for several in itertools.combinations(SPECS, 3):
        uses = [(spec, "columns", "float32") for spec in several]
        breakpoints = common_breakpoints(uses, GENERIC)
        assert set(breakpoints) <= set(BREAKPOINTS)
        for spec, contract, dtype in uses:
            trees, times = priced(spec, contract, GENERIC, dtype)
            alone = timed_plan(spec, contract, GENERIC)
            together = timed_plan(spec, contract, GENERIC, breakpoints)
            for k, batch in enumerate(GRID):
                tree = together.piece(batch).tree
                assert tree == alone.piece(batch).tree
                slower.append(math.log(times[trees.index(tree), k] / times[:, k].min()))
    assert sum(slower) < 0.03 * len(slower)


# ------------------------------------------------------------------------------- in a model


class Trains(nn.Module):
    """Two linears of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def compressed(**options: object) -> nn.Module:
    return tensorize.compile(
        Trains(),
        None,
        ranks={"*": 12},
        formats="tt",
        example_inputs=(torch.randn(4, 64),),
        **options,
    )


def holders(model: nn.Module) -> list[Cores]:
    return [module for module in model.modules() if isinstance(module, Cores)]


def test_all_weights_of_a_model_change_at_the_same_batches() -> None:
    found = {holder.breakpoints for holder in holders(compressed())}
    assert len(found) == 1
    (breakpoints,) = found
    assert breakpoints is not None
    assert len(breakpoints) <= 2


def test_they_survive_saving_and_copying(tmp_path: Path) -> None:
    import copy
    import pickle

    small = compressed()
    (want,) = {holder.breakpoints for holder in holders(small)}
    tensorize.save(small, tmp_path / "kept")
    loaded = tensorize.load(tmp_path / "kept", Trains())
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert {holder.breakpoints for holder in holders(other)} == {want}


def test_dynamic_shapes_compile_three_graphs_at_most() -> None:
    small = compressed()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(small, backend=count, dynamic=True)
    for rows in (2, 3, 7, 8, 15, 31, 33, 64, 100, 200, 500, 1000, 3000):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), small(x))
    assert graphs <= 3


# ------------------------------------------------------------------------------------- timed


def test_orders_are_timed_remembered_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    compressed()
    assert not timed_orders.place().exists()  # nothing is timed unless asked for
    monkeypatch.setattr(
        timed_orders, "fastest", lambda plans, *rest: aten.layouts(plans[-1], 2)[-1]
    )
    tuned = compressed(autotune=True)
    known = timed_orders.known()
    assert known
    (breakpoints,) = {holder.breakpoints for holder in holders(tuned)}
    for name, found in factored(tuned):
        for asked, _, plans in contenders(found.spec.plain, "columns", GENERIC, breakpoints):
            assert asked in known, name
            (slowest,) = aten.layouts(plans[-1], 2)[-1].pieces
            assert known[asked] == (slowest.tree, slowest.layout)
    x = torch.randn(5, 64)
    torch.testing.assert_close(tuned(x), tensorize.densify(tuned)(x))
    contractions.cache_clear()


def test_what_is_timed_are_the_calls_themselves() -> None:
    spec = SPECS[1]
    slow, fast = (one_order(spec, "columns", tree) for tree in (("x", (0, 1)), (("x", 0), 1)))
    (piece,) = timed_orders.fastest((slow, fast), (1, 3), torch.float32).pieces
    assert piece.tree == fast.pieces[0].tree


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": "b("}'])
def test_a_file_of_orders_that_cannot_be_read_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    timed_orders.place().write_text(text)
    assert timed_orders.known() == {}


def test_any_order_gives_the_same_product() -> None:
    spec = SPECS[2]
    cores = [torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes]
    x = torch.randn(3, spec.shape[1], dtype=torch.float64)
    want = x @ reconstruct(spec, cores).t()
    for breakpoints in (None, (), (2,), (2, 3)):
        found = contractions(spec, breakpoints=breakpoints)["columns"](x, cores)
        torch.testing.assert_close(found, want)


def test_low_rank_has_one_order_and_no_breakpoints() -> None:
    small = tensorize.compile(MLP(), 0.5)
    assert [w.contractions for _, w in factored(small) if w.contractions] == []
