"""Low rank that does not store an identity, as points beside those that store all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.ir.budget import Budget
from tensorize.ir.machine import GENERIC
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Site, Use
from tensorize.passes.allocate.candidates import COSTS, curve_points
from tensorize.weight.install import factored
from tests.models import CASES, parameters, relative
from tests.passes.allocate.programs import M, N, falling, linear, model_of, plan, program


def lost(found: Plan) -> float:
    return sum(site.predicted_loss for site in found.sites)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_same_budget_buys_more(budget: float) -> None:
    made = model_of()
    plain, found = plan(made, budget, pivots=False), plan(made, budget)
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
        at = {
            bool(s.pivoted): k for k, s in enumerate(specs) if s is not None and s.ranks == (100,)
        }
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
def test_compile_makes_it_and_it_is_what_was_planned(refine: str | None) -> None:
    torch.manual_seed(0)
    model, data = Net().eval(), list(torch.randint(0, 80, (8, 4, 12)))
    small = tensorize.compile(model, 0.7, calibration=data, refine=refine)
    found = tensorize.report(small)
    assert any(weight.spec.pivoted for _, weight in factored(small))
    assert parameters(small) == found.plan.predicted.parameters
    assert found.totals.after.bytes == found.plan.predicted.bytes
    with torch.no_grad():
        assert relative(small(data[0]), tensorize.densify(small)(data[0])) < 1e-5


USES = {
    "convolution": (Use("conv2d", "columns", split=1), (64, 16, 3, 3)),
    "convolution of groups": (Use("conv2d", "columns", split=1, groups=4), (256, 16, 3, 3)),
    "bag": (Use("embedding_bag", "lookup"), (96, 64)),
    "experts": (Use("grouped_mm", "columns"), (4, 96, 64)),
    "parts": (Use("linear", "columns", partial=True), (96, 64)),
    "rebuilt": (Use("weight norm", "whole"), (96, 64)),
}


@pytest.mark.parametrize("name", USES)
def test_every_use_has_both_forms(name: str) -> None:
    use, shape = USES[name]
    site = Site(
        "w", shape, "float32", (use,), last_resort="as it is" if name == "rebuilt" else None
    )
    found = curve_points(falling(site, 8.0), ("low_rank",), 4, (1, 64), pivots=True)
    at = {spec: found.costs[k] for k in range(len(found.labels)) if (spec := found.spec(k))}
    pairs = [(spec, at[spec.plain]) for spec in at if spec.pivoted and spec.plain in at]
    count, (_, n) = max(site.experts, 1), site.matrix
    assert pairs
    for spec, (numbers, size, flops, *_) in pairs:
        removed = count * spec.ranks[0] ** 2
        assert at[spec][0] == spec.parameters == numbers - removed
        assert at[spec][1] == size - 4 * removed + 4 * count * n
        assert (at[spec][2] < flops) == ("convolution" not in name)
        if "convolution" in name:  # its factor is made whole at every call
            assert at[spec][2] == flops
            assert (at[spec][len(COSTS) :] > at[spec.plain][len(COSTS) :]).all()


def test_a_plan_of_convolutions_with_a_limit_on_flops_alone_stores_all() -> None:
    use, shape = USES["convolution"]
    curves = [falling(Site(f"w{k}", shape, "float32", (use,)), 8.0 + 8 * k) for k in range(3)]
    for limit, pivoted in ((Budget(flops=0.5), False), (Budget(params=0.5), True)):
        found = plan(program(curves), limit).sites
        assert {site.spec.pivoted for site in found if site.spec is not None} == {pivoted}


class Images(nn.Module):
    """Convolutions of every kind, then a bag of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(8, 32, 3), nn.Conv2d(32, 48, 1)
        self.groups, self.up = nn.Conv2d(48, 48, 3, groups=2), nn.ConvTranspose2d(48, 48, 2)
        self.bag = nn.EmbeddingBag(400, 48)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x = self.point(torch.relu(self.stem(image)))
        return self.up(torch.relu(self.groups(x))).mean((2, 3)) * self.bag(ids)


def images() -> tuple[Any, list[Any]]:
    data = [(torch.randn(8, 8, 9, 9), torch.randint(0, 400, (8, 10))) for _ in range(8)]
    return Images().eval(), data


def tokens() -> tuple[Any, list[Any]]:
    return CASES["mixtral"].model(), [CASES["mixtral"].batch() for _ in range(4)]


@pytest.mark.parametrize(("made", "refine"), [(images, None), (images, "refit"), (tokens, None)])
def test_compile_makes_what_was_planned_for_every_use(
    made: Callable[[], tuple[Any, list[Any]]], refine: str | None
) -> None:
    torch.manual_seed(0)
    model, data = made()
    how = {"calibration": data, "formats": "low_rank", "refine": refine}
    small = tensorize.compile(model, 0.7, **how)
    found = tensorize.report(small)
    kinds = {site.kind for site in found.plan.sites if site.spec and site.spec.pivoted}
    wanted = ["grouped_mm"] if made is tokens else ["conv2d", "conv_transpose2d", "embedding_bag"]
    assert kinds >= {*wanted}
    assert parameters(small) == found.plan.predicted.parameters
    assert found.totals.after.bytes == found.plan.predicted.bytes
    dense = tensorize.densify(small)
    with torch.no_grad():
        if made is tokens:
            assert relative(small(**data[0]).logits, dense(**data[0]).logits) < 1e-5
        else:
            assert relative(small(*data[0]), dense(*data[0])) < 1e-5
