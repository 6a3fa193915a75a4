"""The best points of all weights within a budget, against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorize.ir.sites import Site
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.choose import Chosen, Tiers
from tests.passes.allocate.programs import LINEAR

quick = settings(max_examples=30, deadline=None, derandomize=True)

FREE = np.full(len(COSTS), np.inf)


def bare(costs: np.ndarray, distortion: np.ndarray) -> Points:
    site = Site("w", (8, 8), "float32", LINEAR)
    costs = np.pad(costs, ((0, 0), (0, len(COSTS) - costs.shape[1])))  # nothing of other kinds
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


def limited(caps: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(caps)).tolist()


def solve(points: Sequence[Points], caps: np.ndarray) -> Chosen | None:
    return Tiers.of([points], limited(caps) or [0]).least_lost(caps)


def solved(points: Sequence[Points], caps: np.ndarray) -> list[int]:
    found = solve(points, caps)
    assert found is not None
    return found.choice


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
    choice = solved(points, caps)
    best = exhaustive(points, caps)
    bound, step = relaxed(points, caps, j)
    assert best is not None
    assert np.all(total(points, choice) <= caps)
    assert bound <= best + 1e-12
    assert best <= lost(points, choice) + 1e-12
    # What is missed is less than one step of one weight: nothing to a model of many.
    assert lost(points, choice) <= bound + step + 1e-12


@pytest.mark.parametrize("active", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
def test_small_instances_are_solved_to_the_optimum(active: list[int]) -> None:
    for seed in range(100):
        points = instance(seed)
        caps = between(points, np.random.default_rng(seed).random(), active)
        best = exhaustive(points, caps)
        if best is None:
            continue
        found = solve(points, caps)
        assert found is not None
        assert found.lost == lost(points, found.choice) <= (1 + 1e-12) * best
        assert found.gap <= 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_of_a_large_instance_is_small(seed: int) -> None:
    points = instance(seed, weights=100, count=40)
    found = solve(points, between(points, 0.3, [0]))
    assert found is not None
    assert 0 <= found.gap < 1e-2


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.75])
def test_a_weight_as_large_as_all_others_is_no_gap(share: float) -> None:
    """A table of words has few points, far from each other: what they leave of a budget is spent
    on the others, and what they want of it is taken from these."""
    others = instance(0, weights=60, count=40)
    size = sum(float(p.costs[-1, 0]) for p in others)
    step = np.array([[0.13 * size], [0.26 * size], [0.52 * size], [size]])
    table = bare(step, lost(others, [0] * 60) * np.array([0.5, 0.1, 0.02, 0.0]))
    caps = between([*others, table], share, [0])
    alone = []
    for k, cost in enumerate(table.costs):
        rest = solve(others, caps - cost)
        if rest is not None:
            alone.append(rest.lost + float(table.distortion[k]))
    found = solve([*others, table], caps)
    assert found is not None
    assert found.lost <= 1.001 * min(alone)
    assert 0 <= found.gap < 1


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.sets(st.integers(0, 2), min_size=1))
def test_no_cap_is_ever_exceeded(seed: int, share: float, active: set[int]) -> None:
    points = instance(seed, weights=6, count=12)
    caps = between(points, share, sorted(active))
    found = solve(points, caps)
    if found is None:
        assert len(active) > 1
        return
    choice = found.choice
    assert np.all(total(points, choice) <= caps)
    if len(active) > 1:
        return
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
        now = lost(points, solved(points, between(points, share, [j])))
        assert now <= before * (1 + 1e-12)
        before = now


@pytest.mark.parametrize("seed", range(40))
def test_limits_that_are_traded_for_each_other_are_feasible_whenever_they_can_be(
    seed: int,
) -> None:
    points = instance(seed)
    caps = between(points, 0.5 * np.random.default_rng(seed).random(), [0, 2])
    found, best = solve(points, caps), exhaustive(points, caps)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert np.all(total(points, found.choice) <= caps)
        assert found.lost == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_the_fewest_parameters_for_a_loss(seed: int) -> None:
    points = instance(seed)
    least, most = (sum(f(p.distortion) for p in points) for f in (np.min, np.max))
    ceiling = least + np.random.default_rng(seed).random() ** 3 * (most - least)
    found = Tiers.of([points], [0]).smallest(ceiling)
    assert found is not None
    choice = found.choice
    assert found.lost <= ceiling
    costs, distortion = everything(points)
    best = costs[distortion <= ceiling, 0].min()
    assert total(points, choice)[0] == best
    assert found.gap == 0.0


def test_no_weights_are_no_problem() -> None:
    assert solved([], FREE) == []
    found = Tiers.of([[]], [0]).smallest(1.0)
    assert found is not None
    assert found.choice == []
