"""No weight is slower than dense, unless the budget forces it; then the report says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.api.analysis import analysis_of
from tensorize.codegen.machine import timed_orders
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import Plan
from tensorize.passes.allocate.slower import allowances
from tensorize.passes.allocate.times import dense_times, spec_times


class Mixed(nn.Module):
    """Two large linears, and between them a small one, for which a second call costs too much."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small = nn.Linear(512, 512), nn.Linear(512, 8)
        self.wide, self.last = nn.Linear(8, 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.small(self.first(x).relu())).relu())


def planned(budget: Any, machine: Machine = GENERIC, **options: object) -> Plan:
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():  # spectra that decay, so that ranks are worth choosing
        for linear in (model.first, model.last):
            u, s, v = torch.linalg.svd(linear.weight)
            linear.weight.copy_((u * s * torch.logspace(0, -3, len(s))) @ v)
    analysis = tensorize.analyze(model, example_inputs=(torch.randn(4, 512),))
    slow_calls = replace(analysis.program, machine=machine)
    return replace(analysis, program=slow_calls).plan(budget, **options)  # type: ignore[arg-type]


def slower(plan: Plan, machine: Machine) -> dict[str, np.ndarray]:
    """By how much of the whole model's time each weight is slower than dense, at every batch."""
    found = analysis_of(plan)
    assert found is not None
    sites = found.program.sites
    dense = {site.name: dense_times(site, plan.batch_sizes, machine) for site in sites}
    whole = np.sum(list(dense.values()), axis=0)
    return {
        site.name: (spec_times(site, choice.spec, plan.batch_sizes, machine) - dense[site.name])
        / whole
        for site, choice in zip(sites, plan.sites, strict=True)
        if choice.spec is not None
    }


def named(plan: Plan) -> set[str]:
    """The weights of which a plan says that they are slower."""
    return {site.name for site in plan.sites if "slower than dense" in site.reason}


def unsaid(plan: Plan, machine: Machine) -> float:
    """What all other weights together lose, of the whole model's time, where it is most."""
    found = [np.zeros(len(plan.batch_sizes))]
    found += [v.clip(min=0) for name, v in slower(plan, machine).items() if name not in named(plan)]
    return float(np.sum(found, axis=0).max())


SLOW_CALLS = replace(GENERIC, launch=2e-5)


@pytest.mark.parametrize("budget", [0.2, 0.35])
def test_a_weight_for_which_factors_are_slower_stays_dense(budget: float) -> None:
    plan = planned(budget, SLOW_CALLS)
    assert named(plan) == set()
    assert unsaid(plan, SLOW_CALLS) <= 0.01
    formats = {site.name: site.format for site in plan.sites}
    assert formats["small.weight"] == formats["wide.weight"] == "dense"
    assert "low_rank" in formats.values()


def test_the_same_weights_are_factorized_where_calls_cost_nothing() -> None:
    free = replace(GENERIC, launch=0.0)
    plan = planned(0.2, free)
    assert named(plan) == set()
    assert unsaid(plan, free) <= 0.01
    assert any(site.spec is not None for site in plan.sites)


def test_a_budget_that_forces_slower_weights_is_met_and_it_is_said() -> None:
    slow = replace(GENERIC, launch=1e-2)
    plan = planned(0.2, slow)
    assert plan.predicted.parameters <= 0.2 * plan.dense.parameters
    factorized = {site.name for site in plan.sites if site.spec is not None}
    assert named(plan) == factorized
    for site in plan.sites:
        assert ("slower than dense at 1, 16, 256 rows" in site.reason) == (site.spec is not None)


def test_what_is_negligible_in_the_whole_model_is_not_slow() -> None:
    whole = np.array([1000.0])
    assert allowances(np.array([[5.0], [-700.0]]), whole) == [5.0]
    assert allowances(np.array([[50.0], [4.0], [3.0]]), whole) == [4.0]


def test_many_that_are_a_little_slower_are_not_negligible() -> None:
    """Each by half a percent of the whole model's time: together they double it."""
    assert allowances(np.full((200, 1), 5.0), np.array([1000.0])) == [0.0]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(60)))
    inputs = (torch.randn(2, 64),)
    analysis = tensorize.analyze(model, example_inputs=inputs, metric="frobenius")
    plan = analysis.plan(0.5, batch_sizes=(1,))
    assert plan.predicted.latency > plan.dense.latency
    assert unsaid(plan, analysis.program.machine) <= 0.01
    assert len(named(plan)) > 30


@pytest.mark.parametrize("budget", [tensorize.Budget(error=0.9), tensorize.Budget(loss=0.5)])
def test_a_limit_on_quality_alone_compresses_weights_that_are_slower(budget: Any) -> None:
    """Where all of them are, leaving them dense would keep all parameters, not next to none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    data = [torch.randn(32, 64) for _ in range(4)]
    plan = tensorize.analyze(model, calibration=data).plan(budget)
    assert plan.predicted.parameters < 0.8 * plan.dense.parameters
    assert named(plan)


def test_a_limit_on_the_latency_speaks_for_itself() -> None:
    plan = planned(tensorize.Budget(params=0.5, latency=1.0), SLOW_CALLS)
    assert all(a <= b for a, b in zip(plan.predicted.latency, plan.dense.latency, strict=True))


def test_the_report_says_what_was_measured() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    small = tensorize.compile(model, None, ranks={"*": 8}, example_inputs=(torch.randn(2, 16),))
    report = tensorize.report(small)
    (note,) = [n for n in report.notes if "slower than dense" in n]
    assert note.startswith("0.weight and 1 like it: slower than dense at ")
    assert "µs predicted" in note  # as the cards of the page say it
    assert "us predicted" in " ".join(str(report).split())  # ASCII, for any pipe
    assert report.to_dict()["notes"] == list(report.notes)
    assert "measured" in note


@pytest.mark.slow
def test_a_plan_does_not_depend_on_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = Mixed()

    def plan() -> Plan:
        return tensorize.analyze(model, example_inputs=(torch.randn(2, 512),), formats="tt").plan(
            0.2
        )

    before = plan()
    tensorize.apply(model, before, autotune=True)
    assert timed_orders.known()  # something was timed, and is remembered
    assert plan() == before
