"""The allocation: the best points of all weights within a budget, against trying everything."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tensorize
from tensorize.algebra.metric import Metric
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import (
    DENSE,
    LOW_RANK,
    TT,
    TTSpec,
)
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.flops import spec_flops
from tensorize.passes.allocate.optimise import (
    TooTight,
    minimise_cost,
    minimise_distortion,
    solve,
)
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.orders.by_flops import plan_contraction
from tensorize.passes.pipeline import Program
from tensorize.passes.predict.predictor import Predictor, Trial
from tests.models import MLP, parameters

quick = settings(max_examples=30, deadline=None, derandomize=True)
BOTH = (DENSE, LOW_RANK)
FREE = np.full(len(COSTS), np.inf)
LINEAR = (Use("linear", "columns"),)


# ------------------------------------------------------------------- instances of the bare problem


def bare(costs: np.ndarray, distortion: np.ndarray) -> Points:
    site = Site("w", (8, 8), "float32", LINEAR)
    return Points(
        site, costs, distortion, distortion, np.sqrt(distortion), np.arange(1, len(distortion) + 1)
    )


def instance(seed: int, weights: int = 4, count: int = 6, largest: int = 60) -> list[Points]:
    """Random points; bytes follow parameters, FLOPs sometimes fall where parameters grow."""
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(weights):
        size = np.sort(rng.integers(1, largest, count)).astype(float)
        distortion = np.sort(rng.exponential(rng.exponential(1), count))[::-1].copy()
        if rng.random() < 0.5:
            distortion[-1] = 0.0
        flops = size * rng.choice([1, 2, 4])
        if rng.random() < 0.4:
            flops[-1] = 0.0  # as a dense table that is only looked up
        points.append(bare(np.stack([size, size * rng.choice([2, 4]), flops], 1), distortion))
    return points


def between(points: Sequence[Points], share: float, active: Sequence[int]) -> np.ndarray:
    """Caps somewhere between the least and the most that can be spent."""
    least, most = (sum(f(p.costs, axis=0) for p in points) for f in (np.min, np.max))
    caps = FREE.copy()
    for j in active:
        caps[j] = math.floor(least[j] + share * (most[j] - least[j]))
    return caps


def total(points: Sequence[Points], choice: Sequence[int]) -> np.ndarray:
    return np.sum([p.costs[k] for p, k in zip(points, choice, strict=True)], axis=0)


def lost(points: Sequence[Points], choice: Sequence[int]) -> float:
    return float(sum(p.objective[k] for p, k in zip(points, choice, strict=True)))


def everything(points: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """Costs and distortion of every choice."""
    choices = np.indices([len(p.labels) for p in points]).reshape(len(points), -1)
    costs = sum(p.costs[k] for p, k in zip(points, choices, strict=True))
    return costs, sum(p.objective[k] for p, k in zip(points, choices, strict=True))


def exhaustive(points: Sequence[Points], caps: np.ndarray) -> float | None:
    """The least distortion within the caps, by trying every choice; None where there is none."""
    costs, distortion = everything(points)
    within = distortion[np.all(costs <= caps, axis=1)]
    return float(within.min()) if len(within) else None


def relaxed(points: Sequence[Points], caps: np.ndarray, j: int) -> tuple[float, float]:
    """A lower bound by Lagrange duality on cost j, and the largest step of a convex hull."""
    slopes, steps = [0.0], [0.0]
    for p in points:
        for a, b in itertools.combinations(range(len(p.labels)), 2):
            extra, gain = p.costs[b, j] - p.costs[a, j], p.objective[a] - p.objective[b]
            if extra:
                slopes.append(gain / extra)
            steps.append(abs(gain))
    bounds = []
    for multiplier in slopes:
        if multiplier >= 0:
            least = sum(float(np.min(p.objective + multiplier * p.costs[:, j])) for p in points)
            bounds.append(least - multiplier * caps[j])
    return max(bounds), max(steps)


@pytest.mark.parametrize("j", [0, 2], ids=["params", "flops"])
@pytest.mark.parametrize("seed", range(25))
def test_one_limit_is_within_the_duality_gap_of_the_optimum(seed: int, j: int) -> None:
    points = instance(seed)
    caps = between(points, np.random.default_rng(seed).random(), [j])
    choice = minimise_distortion(points, caps)
    best = exhaustive(points, caps)
    bound, step = relaxed(points, caps, j)
    assert best is not None
    assert np.all(total(points, choice) <= caps)
    assert bound <= best + 1e-12
    assert best <= lost(points, choice) + 1e-12
    # What is missed is less than one step of one weight: nothing to a model of many.
    assert lost(points, choice) <= bound + step + 1e-12


@pytest.mark.parametrize("active", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
def test_small_instances_are_solved_to_half_a_percent_of_the_optimum(active: list[int]) -> None:
    for seed in range(100):
        points = instance(seed)
        caps = between(points, np.random.default_rng(seed).random(), active)
        best = exhaustive(points, caps)
        if best is None:
            continue
        found = solve(points, caps)
        assert found.objective == pytest.approx(lost(points, found.choice))
        assert found.bound <= best + 1e-12 <= found.objective + 2e-12
        assert found.objective <= 1.005 * best + 1e-12
        assert found.gap <= 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_of_a_large_instance_is_small(seed: int) -> None:
    points = instance(seed, weights=100, count=40)
    found = solve(points, between(points, 0.3, [0]))
    assert 0 <= found.gap < 5e-3


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.sets(st.integers(0, 2), min_size=1))
def test_no_cap_is_ever_exceeded(seed: int, share: float, active: set[int]) -> None:
    points = instance(seed, weights=6, count=12)
    caps = between(points, share, sorted(active))
    try:
        choice = minimise_distortion(points, caps)
    except TooTight:
        assert len(active) > 1
        return
    assert np.all(total(points, choice) <= caps)
    # And what is left of the budget buys no improvement of any one weight.
    left = caps - total(points, choice)
    for p, k in zip(points, choice, strict=True):
        affordable = np.all(p.costs - p.costs[k] <= left, axis=1)
        assert p.objective[affordable].min() >= p.objective[k]


@quick
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2]))
def test_a_larger_budget_is_never_worse(seed: int, j: int) -> None:
    points = instance(seed, weights=5, count=10)
    points.append(points[0])  # two weights of one curve: ties everywhere
    before = math.inf
    for share in np.linspace(0, 1, 60):
        now = lost(points, minimise_distortion(points, between(points, share, [j])))
        assert now <= before * (1 + 1e-12)
        before = now


@pytest.mark.parametrize("seed", range(40))
def test_limits_that_are_traded_for_each_other_are_feasible_whenever_they_can_be(
    seed: int,
) -> None:
    points = instance(seed)
    caps = between(points, 0.5 * np.random.default_rng(seed).random(), [0, 2])
    best = exhaustive(points, caps)
    if best is not None:
        choice = minimise_distortion(points, caps)
        assert np.all(total(points, choice) <= caps)
        assert lost(points, choice) >= best - 1e-12
        return
    with pytest.raises(TooTight) as caught:
        minimise_distortion(points, caps)
    tight = caught.value
    caps[tight.cost] = tight.total  # what the error names is feasible
    assert np.all(total(points, minimise_distortion(points, caps)) <= caps)


@pytest.mark.parametrize("seed", range(40))
def test_the_fewest_parameters_for_a_loss(seed: int) -> None:
    points = instance(seed)
    least, most = (sum(f(p.distortion) for p in points) for f in (np.min, np.max))
    ceiling = least + np.random.default_rng(seed).random() ** 3 * (most - least)
    choice = minimise_cost(points, ceiling)
    assert lost(points, choice) <= ceiling
    costs, distortion = everything(points)
    best = costs[distortion <= ceiling, 0].min()
    step = max(np.diff(p.costs[:, 0]).max() for p in points)
    assert best <= total(points, choice)[0] <= best + step  # one step of one weight may be missed


def test_no_weights_are_no_problem() -> None:
    assert minimise_distortion([], FREE) == []
    assert minimise_cost([], 1.0) == []


# --------------------------------------------------------------------- programs with given curves


def curve(site: Site, distortion: Sequence[float], in_nats: bool = True) -> Spectrum:
    """A curve that says what it is told."""
    tails = torch.zeros(min(site.matrix) + 1, dtype=torch.float64)
    tails[: len(distortion)] = torch.tensor(distortion, dtype=torch.float64)
    return Spectrum(site, BOTH, (Metric(1.0, None, None),), tails, in_nats=in_nats)


def falling(site: Site, half_life: float = 16.0, size: float = 1.0) -> Spectrum:
    ranks = np.arange(min(site.matrix))
    return curve(site, list(size * 0.5 ** (ranks / half_life)))


def program(
    curves: Sequence[Spectrum], blocked: Sequence[Site] = (), other: int = 0, **changes: Any
) -> Program:
    sites = (*(c.site for c in curves), *blocked)
    sizes = {site.name: (site.parameters, 4 * site.parameters) for site in sites}
    if other:
        sizes["bias"] = (other, 4 * other)
    found = Program(
        nn.Module(),
        metric="loss",
        sites=sites,
        sizes=sizes,
        spectra={c.site.name: c for c in curves},
        predictor=Predictor((), "nats", held_out=True),
    )
    return replace(found, **changes)


M, N = 512, 384


def linear(name: str, m: int = M, n: int = N, uses: tuple[Use, ...] = LINEAR) -> Site:
    return Site(name, (m, n), "float32", uses)


def plan(made: Program, budget: Budget | float | None, **options: Any) -> Plan:
    found = Allocate(None if budget is None else Budget.of(budget), **options).run(made).plan
    assert found is not None
    return found


def model_of(count: int = 6, other: int = 500) -> Program:
    curves = [falling(linear(f"w{k}"), 8 + 4 * k, 1 + k % 3) for k in range(count)]
    return program(curves, other=other)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_used_and_never_exceeded(budget: float) -> None:
    made = model_of()
    found = plan(made, budget)
    limit = math.floor(budget * found.dense.parameters)
    assert 0.98 * limit <= found.predicted.parameters <= limit
    kept = sum(site.parameters_after for site in found.sites) + 500
    assert found.predicted.parameters == kept
    assert found.predicted.bytes == 4 * kept


def test_a_share_counts_everything_that_is_no_matmul() -> None:
    dense = 6 * M * N
    heavy = plan(model_of(other=dense), 0.6)
    assert heavy.dense.parameters == 2 * dense
    assert heavy.predicted.parameters <= 1.2 * dense
    assert sum(site.parameters_after for site in heavy.sites) <= 0.2 * dense


def test_everything_fits_a_budget_of_one() -> None:
    found = plan(model_of(), 1.0)
    assert {site.format for site in found.sites} == {DENSE}
    assert found.predicted.parameters == found.dense.parameters
    assert found.predicted.loss == 0.0


def test_a_weight_that_needs_little_stays_small_even_where_there_is_room() -> None:
    made = program([curve(linear("exact"), [1.0, 0.5, 0.0])])
    (site,) = plan(made, 1.0).sites
    assert (site.ranks, site.predicted_error) == ((2,), 0.0)


def test_equal_weights_share_equally() -> None:
    made = program([falling(linear(f"w{k}")) for k in range(8)])
    ranks = [site.ranks[0] for site in plan(made, 0.4).sites]
    assert max(ranks) - min(ranks) <= 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_weight_that_no_data_reach_is_worth_what_a_typical_one_is(size: float) -> None:
    """Its distortion is in another unit than the loss, of whatever size."""
    unseen = replace(falling(linear("unseen"), size=size), in_nats=False)
    made = program([*(falling(linear(f"w{k}"), size=0.02) for k in range(4)), unseen])
    ranks = [site.ranks[0] for site in plan(made, 0.4).sites]
    assert max(ranks) - min(ranks) <= 1


def test_what_matters_more_gets_more() -> None:
    sizes = (0.01, 1.0, 100.0)
    made = program([falling(linear(f"w{k}"), size=s) for k, s in enumerate(sizes)])
    small, middle, large = (site.ranks[0] for site in plan(made, 0.3).sites)
    assert small < middle < large


def test_a_larger_budget_never_predicts_worse() -> None:
    made = model_of()
    before = math.inf
    for thousandths in range(30, 1001, 23):
        found = plan(made, thousandths / 1000).predicted
        assert found.loss is not None
        assert found.loss <= before
        before = found.loss


def test_flops_and_bytes_are_limited_too() -> None:
    made = model_of()
    dense = plan(made, 1.0).dense
    assert dense.flops == 2 * 6 * M * N
    for budget in (Budget(flops=0.5), Budget(bytes=0.5), Budget(flops=dense.flops // 3)):
        found = plan(made, budget)
        for name, limit in budget.limits(dense).items():
            used = getattr(found.predicted, name)
            assert 0.98 * limit <= used <= limit
    several = plan(made, Budget(params=0.5, bytes=0.4, flops=0.45))
    assert several.predicted.parameters <= 0.5 * dense.parameters
    assert several.predicted.bytes <= 0.4 * dense.bytes
    assert several.predicted.flops <= 0.45 * dense.flops
    assert several.predicted.bytes >= 0.95 * 0.4 * dense.bytes


def test_a_lookup_costs_nothing_dense_and_its_second_factor_compressed() -> None:
    lookup, linear_use = Use("embedding", "lookup"), Use("linear", "columns")
    for uses, dense, low in (
        ((lookup,), 0, 2 * 3 * N),
        ((linear_use,), 2 * M * N, 2 * 3 * (M + N)),
        ((lookup, linear_use), 2 * M * N, 2 * 3 * (M + N) + 2 * 3 * N),
    ):
        made = program([falling(linear("w", uses=uses))])
        assert plan(made, 1.0).dense.flops == dense
        assert plan(made, None, ranks={"w": 3}).predicted.flops == low


def test_experts_count_all_their_parameters_and_the_work_of_one() -> None:
    site = Site("experts", (5, M, N), "float32", (Use("grouped_mm", "rows"),))
    found = plan(program([falling(site)]), None, ranks={"experts": 3})
    assert found.predicted.parameters == 5 * 3 * (M + N)
    assert found.predicted.flops == 2 * 3 * (M + N)
    assert found.dense.flops == 2 * M * N
    limited = plan(program([falling(site)]), 0.5).sites[0]
    assert limited.spec == TTSpec.low_rank(M, N, limited.ranks[0], experts=5)
    assert limited.parameters_after <= 0.5 * site.parameters


def test_flops_of_a_train_are_those_of_its_worst_batch() -> None:
    spec = TTSpec((8, 8), (6, 8), (20,))
    site = linear("w", 64, 48)
    per_row = [math.ceil(plan_contraction(spec, "columns").flops(b) / b) for b in (1, 16, 256)]
    assert len(set(per_row)) > 1
    assert spec_flops(site, spec, (1, 16, 256)) == max(per_row)
    assert spec_flops(site, spec, (256,)) == per_row[-1]


# -------------------------------------------------------------------------- limits on the damage


def test_an_error_limit_holds_for_every_site_with_the_fewest_parameters() -> None:
    made = model_of()
    found = plan(made, Budget(error=0.3))
    for site in found.sites:
        tails = made.spectra[site.name].distortion
        errors = (tails / tails[0]).sqrt()
        assert site.predicted_error <= 0.3
        if site.spec is not None:
            assert float(errors[site.ranks[0] - 1]) > 0.3
        else:
            m, n = made.spectra[site.name].site.matrix
            assert float(errors[(m * n - 1) // (m + n)]) > 0.3


def test_an_error_limit_and_a_size_together() -> None:
    found = plan(model_of(), Budget(error=0.5, params=0.6))
    assert max(site.predicted_error for site in found.sites) <= 0.5
    assert 0.98 * 0.6 <= found.predicted.parameters / found.dense.parameters <= 0.6


@pytest.mark.parametrize("limit", [1e-3, 0.05, 0.5, 2.0])
def test_a_loss_limit_holds_and_is_used(limit: float) -> None:
    trials = (Trial(0.01, 0.02, 0.0, 0.1), Trial(1.0, 3.0, 0.0, 0.5))
    made = replace(model_of(), predictor=Predictor(trials, "nats", held_out=True))
    found = plan(made, Budget(loss=limit))
    assert found.predicted.loss is not None
    assert 0.9 * limit <= found.predicted.loss <= limit
    smaller = Budget(params=int(0.98 * found.predicted.parameters))
    predicted = plan(made, smaller).predicted.loss
    assert predicted is not None
    assert predicted > limit


def test_a_loss_limit_and_a_size_together() -> None:
    made = model_of()
    found = plan(made, Budget(loss=1.0, params=0.7))
    assert found.predicted.loss is not None
    assert found.predicted.loss <= 1.0
    assert found.predicted.parameters <= 0.7 * found.dense.parameters


def test_a_loss_limit_without_data_says_what_is_missing() -> None:
    with pytest.raises(BudgetError, match="needs to know the loss") as caught:
        plan(replace(model_of(), predictor=None), Budget(loss=0.1))
    assert "calibration" in str(caught.value)


# ------------------------------------------------------------------------ what is not feasible


def refused(made: Program, budget: Budget | float, **options: Any) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        plan(made, budget, **options)
    assert caught.value.way_out
    return caught.value


def number(pattern: str, error: BudgetError) -> str:
    found = re.search(pattern, str(error))
    assert found, str(error)
    return found.group(1).replace(",", "")


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("share", [0.001, 0.02])
def test_too_small_a_size_names_the_smallest_and_that_one_is_feasible(
    name: str, share: float
) -> None:
    blocked = replace(linear("router"), blocked="excluded by the caller")
    made = program([falling(linear(f"w{k}")) for k in range(3)], [blocked], other=100)
    error = refused(made, Budget(**{name: share}))
    smallest = int(number(r"smallest feasible value is ([\d,]+)", error))
    found = plan(made, Budget(**{name: smallest}))
    figure = "parameters" if name == "params" else name
    assert getattr(found.predicted, figure) == smallest
    refused(made, Budget(**{name: smallest - 1}))
    assert error.site == "router"
    assert "router (" in error.cause
    assert "excluded by the caller" in error.cause
    if name != "flops":
        assert "biases, norms" in error.cause
    advice = number(r"budget=([^\s]+?),? ", error)
    value = eval(advice, {"tensorize": tensorize})
    assert getattr(plan(made, value).predicted, figure) <= 1.01 * smallest


def test_a_forced_choice_larger_than_the_budget_names_what_it_takes() -> None:
    made = program([falling(linear("w")), falling(linear("v"))])
    error = refused(made, 0.5, ranks={"w": "full"})
    smallest = int(number(r"smallest feasible value is ([\d,]+)", error))
    assert smallest == N * (M + N) + (M + N)
    assert "ranks='full'" in error.cause
    found = plan(made, Budget(params=smallest), ranks={"w": "full"})
    assert found.predicted.parameters == smallest


def test_limits_that_exclude_each_other_name_one_that_is_feasible() -> None:
    """A table that is looked up: fewer parameters cost FLOPs that the dense table does not."""
    table = linear("table", uses=(Use("embedding", "lookup"),))
    made = program([falling(table), falling(linear("w"))])
    dense = plan(made, 1.0).dense
    least = 2 * (M + N)  # of w at rank 1; the table is looked up dense
    assert plan(made, Budget(params=0.1, flops=least + 2 * N))  # the table at rank 1
    for flops in (least, least + 2 * N - 1):
        budget = Budget(params=0.1, flops=flops)
        for name in ("params", "flops"):
            assert plan(made, Budget(**{name: getattr(budget, name)}))
        error = refused(made, budget)
        name = number(r"the smallest (\w+) found is", error)
        value = int(number(r"the smallest \w+ found is ([\d,]+)", error))
        met = replace(budget, **{name: value})
        found = plan(made, met)
        assert found.predicted.parameters <= met.limits(dense)["params"]
        assert found.predicted.flops <= met.limits(dense)["flops"]


def test_an_error_that_no_point_reaches_names_the_smallest_of_all_sites() -> None:
    made = program([falling(linear("w"), 4.0), falling(linear("v"), 30.0)])
    options = {"formats": {"w": (LOW_RANK,), "v": (LOW_RANK,)}}
    error = refused(made, Budget(error=0.05), **options)
    assert error.site == "v"
    value = float(number(r"the smallest is ([\d.e+-]+)", error))
    found = plan(made, Budget(error=value), **options)
    worst = max(site.predicted_error for site in found.sites)
    assert 0.99 * value <= worst <= value


@pytest.mark.parametrize("limits", [{}, {"params": 0.3}])
def test_a_loss_that_no_choice_reaches_names_the_smallest(limits: dict[str, float]) -> None:
    made = program([falling(linear("w"), 64.0), falling(linear("v"), 64.0, size=0.1)])
    options = {"formats": {"w": (LOW_RANK,), "v": (LOW_RANK,)}}
    error = refused(made, Budget(loss=1e-4, **limits), **options)
    assert error.site == "w"
    value = float(number(r"allow loss=([\d.e+-]+)", error))
    found = plan(made, Budget(loss=value, **limits), **options)
    assert found.predicted.loss is not None
    assert 0.95 * value <= found.predicted.loss <= value


# ------------------------------------------------------------------------------ ranks by hand


def test_ranks_override_the_allocation_and_the_rest_is_allocated() -> None:
    made = model_of()
    found = plan(made, 0.4, ranks={"w2": 5})
    chosen = {site.name: site for site in found.sites}
    assert chosen["w2"].ranks == (5,)
    assert chosen["w2"].reason == "ranks=5"
    assert 0.98 * 0.4 <= found.predicted.parameters / found.dense.parameters <= 0.4
    tails = made.spectra["w2"].distortion
    assert chosen["w2"].predicted_loss == float(tails[5])
    assert chosen["w2"].predicted_error == pytest.approx(float((tails[5] / tails[0]).sqrt()))


def test_without_a_budget_the_rest_stays_dense() -> None:
    found = plan(model_of(), None, ranks={"w[01]": 5})
    assert [site.format for site in found.sites] == [LOW_RANK] * 2 + [DENSE] * 4
    assert found.budget == "none"
    assert found.sites[2].reason == "not named by ranks="


def test_full_is_exact_and_large_ranks_are_cut() -> None:
    for rank in ("full", N, 1000):
        (site, *_) = plan(model_of(), None, ranks={"w0": rank}).sites
        assert site.spec == TTSpec.low_rank(M, N, N)
        assert (site.predicted_error, site.predicted_loss) == (0.0, 0.0)


def test_a_name_goes_before_a_pattern_and_the_first_pattern_before_others() -> None:
    found = plan(model_of(), None, ranks={"w0": 7, "w[0-2]": 6, "*": 5})
    assert [site.ranks[0] for site in found.sites] == [7, 6, 6, 5, 5, 5]


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "half", None])
def test_what_is_no_rank_is_refused(rank: Any) -> None:
    with pytest.raises(AnalysisError, match=r"ranks\['w0'\] must be a positive integer or 'full'"):
        plan(model_of(), None, ranks={"w0": rank})


def test_a_pattern_that_names_nothing_is_refused_with_near_names() -> None:
    with pytest.raises(AnalysisError, match="ranks='w9' matches no weight") as caught:
        plan(model_of(), None, ranks={"w9": 3})
    assert "near names: w" in str(caught.value)


def test_a_rank_for_a_blocked_weight_is_refused_but_not_by_a_pattern() -> None:
    blocked = replace(linear("router"), blocked="excluded by the caller")
    made = program([falling(linear("w"))], [blocked])
    with pytest.raises(AnalysisError, match=r"^router: .*excluded by the caller"):
        plan(made, None, ranks={"router": 3})
    found = plan(made, None, ranks={"*": 3})
    assert [site.format for site in found.sites] == [LOW_RANK, DENSE]
    assert found.sites[1].reason == "excluded by the caller"


# --------------------------------------------------------------------------------- the formats


def trained(formats: tuple[str, ...] | None) -> Program:
    """A Kronecker-structured weight and one without structure, with their real curves."""
    generator = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(s, generator=generator) for s in ((8, 6), (8, 8), (64, 48)))
    curves = [
        spectrum(linear(name, 64, 48), weight, (Metric(1.0, None, None),), formats)
        for name, weight in {"kronecker": torch.kron(a, b), "noise": noise}.items()
    ]
    return replace(program(curves), predictor=None, metric="frobenius")


def test_structure_that_was_found_is_used() -> None:
    found = {site.name: site for site in plan(trained(None), 0.3).sites}
    assert found["kronecker"].format == TT
    assert found["kronecker"].predicted_error < 1e-5
    assert found["noise"].format in BOTH


@pytest.mark.parametrize("allowed", [(LOW_RANK,), (TT,), (DENSE, TT), (DENSE,)])
def test_only_the_formats_that_are_allowed_are_used(allowed: tuple[str, ...]) -> None:
    made = trained((DENSE, LOW_RANK, TT))
    options = {"formats": dict.fromkeys(("kronecker", "noise"), allowed)}
    found = plan(made, 1.0, **options)
    assert {site.format for site in found.sites} <= set(allowed)
    if DENSE not in allowed:
        # No exact point is allowed, and the budget is spent as far as the points go.
        assert found.predicted.parameters > 0.5 * found.dense.parameters or TT in allowed


def test_ranks_of_trains() -> None:
    made = trained((TT,))
    for rank, expected in ((3, 3), ("full", made.spectra["noise"].trains[0].spec.ranks[0])):
        found = plan(made, None, ranks={"*": rank})
        assert [site.format for site in found.sites] == [TT, TT]
        assert found.sites[1].ranks[0] == expected
        curve_of = made.spectra["noise"]
        lost_there = curve_of.distortion_of(found.sites[1].spec)
        assert found.sites[1].predicted_error == pytest.approx(curve_of.error(lost_there))


def test_a_weight_too_small_for_any_rank_says_so() -> None:
    made = program([falling(linear("w")), curve(linear("thin", 1, N), [1.0])])
    site = plan(made, 0.6).sites[1]
    assert site.format == DENSE
    assert site.reason == "no rank of low_rank saves parameters"


# ------------------------------------------------------------------------------ units of errors


def test_without_data_nothing_is_predicted_but_errors() -> None:
    curves = [replace(falling(linear(f"w{k}")), in_nats=False) for k in range(3)]
    found = plan(program(curves, metric="frobenius", predictor=None), 0.4)
    assert found.predicted.loss is None
    assert found.predicted.loss_interval is None
    assert all(site.predicted_loss == 0.0 for site in found.sites)
    worst = max(site.predicted_error for site in found.sites)
    assert found.predicted.output_error == worst > 0


def test_without_data_the_scale_of_a_weight_matters_half() -> None:
    """Neither absolute errors (the small weight would vanish) nor relative ones (all the same)."""
    curves = [replace(falling(linear(f"w{k}"), size=10.0**k), in_nats=False) for k in range(3)]
    found = plan(program(curves, metric="frobenius", predictor=None), 0.4)
    absolute = plan(program([replace(c, in_nats=True) for c in curves]), 0.4)
    kept, steeper = ([s.parameters_after for s in p.sites] for p in (found, absolute))
    assert kept == sorted(kept)
    assert 0 < kept[-1] - kept[0] < steeper[-1] - steeper[0]


def test_a_weight_that_the_data_say_nothing_about_adds_nothing_to_the_prediction() -> None:
    known, unknown = falling(linear("w")), replace(falling(linear("idle")), in_nats=False)
    found = plan(program([known, unknown]), 0.4)
    chosen = {site.name: site for site in found.sites}
    assert chosen["idle"].predicted_loss == 0.0
    assert chosen["w"].predicted_loss == found.predicted.loss
    assert chosen["idle"].format == DENSE or chosen["idle"].predicted_error > 0


# ------------------------------------------------------------------------------ plans as objects


def test_plans_are_values() -> None:
    one, two, other = plan(model_of(), 0.4), plan(model_of(), 0.4), plan(model_of(), 0.5)
    assert one == two
    assert hash(one) == hash(two)
    assert one != other
    assert len({one, two, other}) == 2


@pytest.mark.parametrize(
    "budget", [0.4, Budget(params=0.5, flops=0.6, error=0.9), Budget(loss=0.5)]
)
def test_plans_go_through_json(budget: Any) -> None:
    found = plan(model_of(), budget, fingerprint="abc", batch_sizes=(1, 7), ranks={"w1": 99})
    again = Plan.from_json(found.to_json())
    assert again == found
    assert hash(again) == hash(found)
    assert again.to_json() == found.to_json()
    assert (again.fingerprint, again.batch_sizes) == ("abc", (1, 7))
    assert again.budget == str(Budget.of(budget))
    trains = plan(trained(BOTH), 0.3)
    assert Plan.from_json(trains.to_json()) == trains


def test_the_same_program_gives_the_same_plan_whatever_was_planned_before() -> None:
    made = model_of()
    first = plan(made, 0.4)
    for budget in (0.9, Budget(error=0.2), Budget(flops=0.3)):
        plan(made, budget)
    assert plan(made, 0.4) == first


# ------------------------------------------------------------------------------------ real models


def test_on_a_real_model_the_figures_are_what_apply_gives() -> None:
    model = MLP()
    analysis = tensorize.analyze(model, calibration=[torch.randn(32, 48) for _ in range(4)])
    before = math.inf
    for budget in (0.25, 0.5, 0.75, Budget(flops=0.5), Budget(bytes=0.4, flops=0.5)):
        found = analysis.plan(budget)
        small = tensorize.apply(model, found)
        assert parameters(small) == found.predicted.parameters
        size = sum(p.numel() * p.element_size() for p in small.parameters())
        assert size == found.predicted.bytes
        if isinstance(budget, float):
            assert found.predicted.loss is not None
            assert found.predicted.loss < before
            before = found.predicted.loss


def test_ranks_are_multiples_where_the_machine_wants_them() -> None:
    model = MLP()
    analysis = tensorize.analyze(model, calibration=[torch.randn(32, 48) for _ in range(4)])
    free, aligned = analysis.plan(0.5), analysis.plan(0.5, rank_multiple=8)
    assert any(rank % 8 for site in free.sites for rank in site.ranks)
    for site in aligned.sites:
        assert all(rank % 8 == 0 or rank < 8 for rank in site.ranks)
    assert parameters(tensorize.apply(model, aligned)) <= 0.5 * parameters(model)
