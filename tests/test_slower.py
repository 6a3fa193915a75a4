"""No weight is slower than dense, unless the budget forces it; then the report says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.ir import GENERIC, Machine, Plan
from tensorize.passes.cost import dense_times, spec_times
from tensorize.passes.slower import is_slow


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


def slower(plan: Plan, machine: Machine) -> set[str]:
    program = plan.analysis.program
    chosen = {site.name: site.spec for site in plan.sites}
    dense = {site.name: dense_times(site, plan.batch_sizes, machine) for site in program.sites}
    whole = np.sum(list(dense.values()), axis=0)
    found = set()
    for site in program.sites:
        spec = chosen[site.name]
        if spec is not None:
            times = spec_times(site, spec, plan.batch_sizes, machine)
            if is_slow(times, dense[site.name], whole):
                found.add(site.name)
    return found


SLOW_CALLS = replace(GENERIC, launch=2e-5)


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_a_weight_for_which_factors_are_slower_stays_dense(budget: float) -> None:
    plan = planned(budget, SLOW_CALLS)
    assert slower(plan, SLOW_CALLS) == set()
    formats = {site.name: site.format for site in plan.sites}
    assert formats["small.weight"] == formats["wide.weight"] == "dense"
    assert "low_rank" in formats.values()


def test_the_same_weights_are_factorized_where_calls_cost_nothing() -> None:
    free = replace(GENERIC, launch=0.0)
    assert slower(planned(0.2, free), free) == set()


def test_a_budget_that_forces_slower_weights_is_met_and_it_is_said() -> None:
    slow = replace(GENERIC, launch=1e-2)
    plan = planned(0.2, slow)
    assert plan.predicted.parameters <= 0.2 * plan.dense.parameters
    found = slower(plan, slow)
    assert found
    for site in plan.sites:
        assert ("slower than dense at 1, 16, 256 rows" in site.reason) == (site.name in found)


def test_what_is_negligible_in_the_whole_model_is_not_slow() -> None:
    dense, whole = np.array([1.0]), np.array([1000.0])
    assert not is_slow(np.array([5.0]), dense, whole)
    assert is_slow(np.array([50.0]), dense, whole)


@pytest.mark.parametrize("budget", [tensorize.Budget(error=0.9), tensorize.Budget(loss=0.5)])
def test_a_limit_on_quality_alone_compresses_weights_that_are_slower(budget: Any) -> None:
    """Where all of them are, leaving them dense would keep all parameters, not next to none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    data = [torch.randn(32, 64) for _ in range(4)]
    plan = tensorize.analyze(model, calibration=data).plan(budget)
    assert plan.predicted.parameters < 0.8 * plan.dense.parameters
    assert "slower than dense" in str(plan)


def test_a_limit_on_the_latency_speaks_for_itself() -> None:
    plan = planned(tensorize.Budget(params=0.5, latency=1.0), SLOW_CALLS)
    assert all(a <= b for a, b in zip(plan.predicted.latency, plan.dense.latency, strict=True))


def test_the_report_says_what_was_measured() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    small = tensorize.compile(model, None, ranks={"*": 8}, example_inputs=(torch.randn(2, 16),))
    (note,) = [n for n in tensorize.report(small).notes if "slower than dense" in n]
    assert note.startswith("0.weight and 1 like it: slower than dense at ")
    assert "µs predicted" in note
    assert "measured" in note


def test_a_plan_does_not_depend_on_what_was_measured() -> None:
    assert planned(0.5) == planned(0.5)
