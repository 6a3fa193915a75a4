"""Low rank that does not store an identity, as points beside those that store all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.api import analysis as api_analysis
from tensorize.ir.machine import GENERIC
from tensorize.ir.plan import Plan
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.candidates import curve_points
from tensorize.weight.install import factored
from tests.models import parameters, relative
from tests.passes.allocate.programs import M, N, falling, linear, model_of, plan


def lost(found: Plan) -> float:
    return sum(site.predicted_loss for site in found.sites)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_same_budget_buys_more(budget: float) -> None:
    made = model_of()
    plain, found = plan(made, budget), plan(made, budget, pivots=True)
    assert lost(found) < lost(plain)
    assert found.predicted.parameters <= budget * found.dense.parameters
    kept = 500
    orders = 0
    for site in found.sites:
        m, n = site.shape
        if site.spec is not None:
            (rank,) = site.ranks
            assert site.parameters_after == rank * (m + n - rank * site.spec.pivoted)
            orders += n * site.spec.pivoted
        kept += site.parameters_after
    assert found.predicted.parameters == kept
    assert found.predicted.bytes == 4 * (kept + orders)


def test_what_rounding_costs_counts_in_half_precision() -> None:
    for dtype, counts in (("float32", False), ("bfloat16", True)):
        curve = falling(replace(linear("w"), dtype=dtype))
        points = curve_points(curve, ("low_rank",), 2, (1,), pivots=True)
        specs = [points.spec(k) for k in range(len(points.labels))]
        at = {s.pivoted: k for k, s in enumerate(specs) if s is not None and s.ranks == (100,)}
        assert (points.distortion[at[True]] > 1.0001 * points.distortion[at[False]]) == counts


def test_tiny_ranks_and_full_ones_store_all() -> None:
    points = curve_points(falling(linear("w")), ("low_rank",), 4, (1,), pivots=True)
    specs = [points.spec(k) for k in range(len(points.labels))]
    ranks = {s.ranks[0] for s in specs if s is not None and s.pivoted}
    assert min(ranks) >= 0.02 * (M + N)
    assert max(ranks) == min(M, N) - 1


def test_where_a_pass_over_the_input_makes_it_slower_than_dense_it_is_no_point() -> None:
    dear = replace(GENERIC, launch=2e-5)
    points = {
        machine.launch: curve_points(
            falling(linear("w")), ("low_rank",), 4, (1,), machine=machine, pivots=True
        )
        for machine in (GENERIC, dear)
    }
    few, many = (
        {s.ranks[0] for s in map(found.spec, range(len(found.labels))) if s and s.pivoted}
        for found in (points[dear.launch], points[GENERIC.launch])
    )
    assert few < many


class Net(nn.Module):
    """Two inputs' worth of linears, a table and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(80, 48), nn.Linear(48, 96)
        self.back, self.head = nn.Linear(96, 48), nn.Linear(48, 80, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.back(torch.tanh(self.mix(x))))


@pytest.mark.parametrize("refine", [None, "refit", "polish"])
def test_compile_makes_it_and_it_is_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, refine: str | None
) -> None:
    monkeypatch.setattr(api_analysis, "Allocate", partial(Allocate, pivots=True))
    torch.manual_seed(0)
    model, data = Net().eval(), list(torch.randint(0, 80, (8, 4, 12)))
    small = tensorize.compile(model, 0.7, calibration=data, refine=refine)
    found = tensorize.report(small)
    assert any(weight.spec.pivoted for _, weight in factored(small))
    assert parameters(small) == found.plan.predicted.parameters
    assert found.totals.after.bytes == found.plan.predicted.bytes
    with torch.no_grad():
        assert relative(small(data[0]), tensorize.densify(small)(data[0])) < 1e-5
