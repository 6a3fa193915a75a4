"""A first factor in common that does not store an identity, as points beside the one that does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tensorize
from tensorize.base.errors import AnalysisError
from tensorize.ir.budget import Budget
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.spec import DENSE, LOW_RANK
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.candidates import COSTS, curve_points
from tensorize.passes.allocate.forms import Forms
from tensorize.passes.allocate.groups import GroupPoints, group_points
from tensorize.passes.allocate.times import dense_times
from tensorize.passes.curves.curve import Spectrum
from tensorize.weight.install import factored
from tests.marks import slow
from tests.models import parameters, relative
from tests.weight.factored_models import grouped

X = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
ROWS, N = 48 + 16 + 16, 48


@pytest.fixture(scope="module")
def curves() -> list[Spectrum]:
    """Those of q, k and v."""
    found = tensorize.analyze(grouped(), example_inputs=(X,), formats="shared").program.spectra
    return [found[f"{name}.weight"] for name in "qkv"]


def points(
    curves: Sequence[Spectrum], *, pivots: bool, batches: Sequence[int] = (1, 64), **options: Any
) -> GroupPoints:
    machine: Machine = options.get("machine", GENERIC)
    how = {"machine": machine, "pivots": pivots}
    members = [curve_points(c, (DENSE, LOW_RANK), 4, batches, **how) for c in curves]
    found = group_points(members, curves, [1.0] * len(curves), batch_sizes=batches, **how)
    assert found is not None
    return found


def in_common(found: GroupPoints) -> list[tuple[int, int, bool]]:
    """Point, rank and form of the points with one first factor."""
    specs = [(k, found.plans(k)[0]) for k in np.flatnonzero(found.labels < 0).tolist()]
    return [(k, plan.ranks[0], plan.spec.pivoted > 0) for k, plan in specs if plan.spec is not None]


def test_both_forms_are_points_that_cost_what_their_plans_say(curves: list[Spectrum]) -> None:
    found = points(curves, pivots=True)
    seen = in_common(found)
    assert {form for *_, form in seen} == {False, True}
    for k, rank, pivoted in seen:
        plans = found.plans(k)
        assert {plan.shared for plan in plans} == {"q.weight"}
        assert {(plan.ranks, plan.spec.pivoted) for plan in plans if plan.spec} == {
            ((rank,), pivoted)
        }
        count = rank * (ROWS + N - rank * pivoted)
        assert found.costs[k, 0] == count == sum(plan.parameters_after for plan in plans)
        assert found.costs[k, 1] == 4 * count + 3 * 4 * N * pivoted  # each holds the order
        assert found.costs[k, 2] == 2 * count


def test_a_price_never_buys_less(curves: list[Spectrum]) -> None:
    both, plain = points(curves, pivots=True), points(curves, pivots=False)
    for price in np.geomspace(1e-6, 1.0, 60):
        least = [(p.objective + price * p.costs[:, 0]).min() for p in (both, plain)]
        assert least[0] <= least[1]
    assert any(form for *_, form in in_common(both))


def test_tiny_ranks_and_full_ones_are_plain(curves: list[Spectrum]) -> None:
    sites = tuple(curve.site for curve in curves)
    ranks = np.arange(1, 100)
    found = Forms(sites, 4, (1,), GENERIC).worthwhile(ranks, pivots=True)[True]
    assert found.min() >= 0.02 * (ROWS + N)
    assert found.max() == N - 1
    large = tuple(replace(site, shape=(1024, 1024)) for site in sites)
    tiny = Forms(large, 4, (1,), GENERIC).worthwhile(np.arange(1, 40), pivots=True)
    assert len(tiny[False]) == 39
    assert len(tiny[True]) == 0


def test_the_input_is_ordered_and_multiplied_once(curves: list[Spectrum]) -> None:
    sites, ranks = tuple(curve.site for curve in curves), np.array([20])
    slow = replace(GENERIC, launch=1.0)  # a second a call, beside which nothing counts
    for pivoted, calls in ((False, 1 + 3), (True, 2 + 3)):
        (row,) = Forms(sites, 4, (1,), slow).costs(ranks, pivoted)
        assert row[len(COSTS)] / 1e6 == pytest.approx(calls, rel=1e-3)


def test_where_ordering_the_input_makes_it_slower_than_dense_it_is_no_point(
    curves: list[Spectrum],
) -> None:
    sites = tuple(replace(curve.site, shape=(512, 512)) for curve in curves)
    ranks = np.arange(1, 384)
    for launch in (0.0, 1.5e-4):
        machine = replace(GENERIC, launch=launch)
        forms = Forms(sites, 4, (16,), machine)
        found = forms.worthwhile(ranks, pivots=True)
        dense = sum(dense_times(site, (16,), machine) for site in sites)
        times = {form: forms.costs(ranks, form)[:, len(COSTS) :] for form in (False, True)}
        fast, slow = (times[False] <= dense).all(-1), (times[True] > dense).any(-1)
        dropped = ranks[fast & slow & (ranks * (3 * 512 + 512) < 3 * 512 * 512)]
        assert not set(dropped) & set(found[True])
        assert bool(len(dropped)) == (launch > 0)


def test_what_rounding_costs_counts_in_half_precision(curves: list[Spectrum]) -> None:
    for dtype, counts in (("float32", False), ("bfloat16", True)):
        own = [replace(curve, site=replace(curve.site, dtype=dtype)) for curve in curves]
        found = points(own, pivots=True)
        at = {(rank, form): k for k, rank, form in in_common(found)}
        rank = max(rank for rank, form in at if form and (rank, False) in at)
        lost = [found.distortion[at[rank, form]] for form in (False, True)]
        assert (lost[1] > 1.0001 * lost[0]) == counts


# ---------------------------------------------------------------------------------------- models


def shared(model: nn.Module) -> list[Any]:
    return [site for site in tensorize.report(model).plan.sites if site.shared is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refine", [None, "refit", slow("polish")])
def test_the_model_holds_what_was_planned(refine: str | None, dtype: torch.dtype) -> None:
    model = grouped().to(dtype)
    data = list(torch.randn(8, 16, 48, generator=torch.Generator().manual_seed(2)).to(dtype))
    small = tensorize.compile(model, 0.6, calibration=data, refine=refine, formats="shared")
    made, plan = shared(small), tensorize.report(small).plan
    assert any(site.spec.pivoted for site in made)
    assert parameters(small) == plan.predicted.parameters
    assert tensorize.report(small).totals.after.bytes == plan.predicted.bytes
    weights = dict(factored(small))
    for site in made:
        first, own = weights[site.shared], weights[site.name]
        assert own.cores[1] is first.cores[1]
        assert all(map(torch.equal, own.indices, first.indices))
    exact = tensorize.densify(small).double()
    with torch.no_grad():
        error = relative(small(data[0]).double(), exact(data[0].double()))
    assert error < 32 * torch.finfo(dtype).eps


def test_its_factors_are_as_near_as_plain_ones_of_that_rank() -> None:
    """A budget from which on a first factor in common has a larger rank than k has rows."""
    model = grouped()
    small = tensorize.compile(model, 0.7, example_inputs=(X,), formats="shared")
    site = next(site for site in shared(small) if site.name == "k.weight")
    assert site.spec.pivoted
    assert site.ranks[0] > 16
    names = ("q.weight", "k.weight", "v.weight")
    stack = torch.cat([model.get_parameter(name) for name in names]).detach().double()
    weights = dict(factored(small))
    found = torch.cat([weights[name].dense().detach() for name in names]).double()
    least = torch.linalg.svdvals(stack)[site.ranks[0] :].square().sum().sqrt()
    assert float((stack - found).norm()) == pytest.approx(float(least), rel=1e-4)


def test_a_plan_of_it_is_kept_as_json_and_checked() -> None:
    model = grouped()
    plan = tensorize.analyze(model, example_inputs=(X,), formats="shared").plan(0.7)
    text = plan.to_json()
    small = tensorize.apply(model, plan)
    again = tensorize.apply(model, tensorize.Plan.from_json(text))
    assert all(map(torch.equal, small.parameters(), again.parameters()))
    data = json.loads(text)
    del data["sha256"]
    one = next(site for site in data["sites"] if site["name"] == "v.weight")
    assert one["spec"].pop("pivoted")
    with pytest.raises(AnalysisError, match="no first factor that it can share"):
        tensorize.apply(model, tensorize.Plan.from_json(json.dumps(data)))


def test_where_kernels_read_no_order_it_is_no_point() -> None:
    found = tensorize.analyze(grouped(), example_inputs=(X,), formats="shared").program
    for multiple, there in ((1, True), (8, False)):
        made = replace(found, machine=replace(found.machine, rank_multiple=multiple))
        sites = Allocate(Budget.of(0.5)).run(made).plan.sites
        assert any(site.shared is not None for site in sites)
        assert any(site.spec is not None and site.spec.pivoted for site in sites) == there


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
def test_budgets_buy_more(budget: float) -> None:
    found = tensorize.analyze(grouped(), example_inputs=(X,), formats=("shared", "dense")).program
    lost = []
    for pivots in (False, True):
        allocate = Allocate(Budget.of(budget), pivots=pivots)
        chosen = allocate.demand(found).choose(Budget.of(budget))
        assert chosen is not None
        lost.append(sum(p.objective[k] for p, k in zip(chosen.points, chosen.choice, strict=True)))
    assert lost[1] < lost[0]
