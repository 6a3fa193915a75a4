"""The optimisation behind the allocation: least distortion within caps on costs, and the reverse.

For a multiplier λ each weight takes the point with the least distortion + λ·cost, independently of
the others; bisection on λ meets the cap (Shoham & Gersho 1988). That is the optimum of the problem
relaxed to the lower convex hulls; what is left is then spent greedily, the best improvement for its
cost first. Several caps are met by one multiplier each, found by coordinate bisection.

The multipliers also give a lower bound on every choice (Lagrange duality). Where the choice is not
within a thousandth of it, a branch and bound over the few points that the bound leaves finishes the
search: to the optimum on small instances, and to a known gap on all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.passes.allocate.candidates import Points


def total_distortion(points: Sequence[Points], choice: Sequence[int]) -> float:
    return float(sum(p.distortion[k] for p, k in zip(points, choice, strict=True)))


def _best(points: Sequence[Points], multipliers: np.ndarray) -> list[int]:
    """Each weight's point of least objective + λ · cost; the cheaper one where two are equal."""
    return [int(np.argmin(p.objective + p.costs @ multipliers)) for p in points]


def total_costs(points: Sequence[Points], choice: Sequence[int]) -> np.ndarray:
    return np.sum([p.costs[k] for p, k in zip(points, choice, strict=True)], axis=0)


@dataclass(frozen=True)
class Solution:
    """A choice of points, its objective, and a bound that no choice within the caps is below."""

    choice: list[int]
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """By what share of the objective a better choice might be better."""
        return max(0.0, 1 - self.bound / self.objective) if self.objective > 0 else 0.0


def minimise_distortion(points: Sequence[Points], caps: np.ndarray) -> list[int]:
    """The least objective with every total cost within its cap (caps may be infinite)."""
    return solve(points, caps).choice


def solve(points: Sequence[Points], caps: np.ndarray) -> Solution:
    """The least objective within the caps that was found, and how far it may be from the least.

    Raises:
        TooTight: no choice was found within several caps.
    """
    if not points:
        return Solution([], 0.0, 0.0)
    multipliers = np.zeros(len(caps))
    active = [j for j in range(len(caps)) if np.isfinite(caps[j])]
    choice = _best(points, multipliers)
    for _ in range(8):  # coordinate bisection: one pass is exact for one limit
        before = multipliers.copy()
        for j in active:
            choice = _bisect(points, multipliers, j, caps[j])
        if len(active) == 1 or np.allclose(before, multipliers, rtol=1e-3):
            break
    if not np.all(total_costs(points, choice) <= caps):
        choice = _repair(points, choice, caps) or _tightest(points, caps, active)
    return _finish(points, _spend(points, choice, caps), caps, multipliers)


_GAP, _NODES, _MOST_WEIGHTS = 1e-3, 20_000, 400


def _finish(
    points: Sequence[Points], choice: list[int], caps: np.ndarray, multipliers: np.ndarray
) -> Solution:
    """Branch and bound over the points whose reduced cost is less than the gap."""
    finite = np.isfinite(caps)
    reduced = [p.objective + p.costs @ multipliers for p in points]
    bound = float(sum(r.min() for r in reduced) - multipliers[finite] @ caps[finite])
    best = float(sum(p.objective[k] for p, k in zip(points, choice, strict=True)))
    if best <= 0 or best - bound <= _GAP * best or len(points) > _MOST_WEIGHTS:
        return Solution(choice, best, min(bound, best))
    reduced = [r - r.min() for r in reduced]
    left = [np.flatnonzero(r < best - bound) for r in reduced]
    order = sorted(range(len(points)), key=lambda i: -len(left[i]))
    candidates = [left[i][np.argsort(reduced[i][left[i]], kind="stable")] for i in order]
    # The least that the weights still to come must cost.
    least = np.zeros((len(points) + 1, len(caps)))
    for depth in range(len(points) - 1, -1, -1):
        costs = points[order[depth]].costs[candidates[depth]]
        least[depth] = least[depth + 1] + (costs.min(0) if len(costs) else np.inf)
    found, nodes = list(choice), 0
    complete = True

    def search(depth: int, above: float, used: np.ndarray, chosen: list[int]) -> None:
        nonlocal best, found, nodes, complete
        if depth == len(points):
            value = float(sum(points[i].objective[k] for i, k in zip(order, chosen, strict=True)))
            if value < best:
                best = value
                for i, k in zip(order, chosen, strict=True):
                    found[i] = k
            return
        i = order[depth]
        for k in candidates[depth].tolist():
            if bound + above + reduced[i][k] >= best:
                return  # the others are worse still
            nodes += 1
            if nodes > _NODES:
                complete = False
                return
            now = used + points[i].costs[k]
            if np.all((now + least[depth + 1])[finite] <= caps[finite]):
                search(depth + 1, above + float(reduced[i][k]), now, [*chosen, k])

    search(0, 0.0, np.zeros(len(caps)), [])
    return Solution(found, best, best if complete else min(bound, best))


class TooTight(Exception):
    """No choice was found within all caps; within the others ``cost`` goes down to ``total``."""

    def __init__(self, cost: int, total: float) -> None:
        super().__init__(cost, total)
        self.cost, self.total = cost, total


def _bisect(points: Sequence[Points], multipliers: np.ndarray, j: int, cap: float) -> list[int]:
    """The smallest multiplier j (changed in place) whose choice is within the cap."""

    def at(value: float) -> list[int]:
        multipliers[j] = value
        return _best(points, multipliers)

    choice = at(0.0)
    if total_costs(points, choice)[j] <= cap:
        return choice
    high = 1e-30
    while total_costs(points, choice := at(high))[j] > cap and high < 1e30:
        high *= 1e3
    low = high / 1e3
    for _ in range(100):
        middle = (low * high) ** 0.5
        if total_costs(points, at(middle))[j] <= cap:
            high = middle
        else:
            low = middle
        if high / low < 1 + 1e-12:
            break
    return at(high)


def _repair(points: Sequence[Points], choice: list[int], caps: np.ndarray) -> list[int] | None:
    """Step down, least harm for what it saves first, until every cap holds; None where stuck."""
    choice = list(choice)
    unit = np.where(np.isfinite(caps), np.maximum(caps, 1.0), np.inf)
    total = total_costs(points, choice)
    while (excess := _excess(total, caps, unit)) > 0:
        best: tuple[float, int, int] | None = None
        for i, p in enumerate(points):
            # What limits are traded for each other: only steps that lower the whole excess count.
            saved = excess - _excess(total + p.costs - p.costs[choice[i]], caps, unit)
            harm = np.maximum(p.objective - p.objective[choice[i]], 0.0)
            for k in np.flatnonzero(saved > 1e-12 * excess):
                rate = float(harm[k] / saved[k])
                if best is None or rate < best[0]:
                    best = (rate, i, int(k))
        if best is None:
            return None
        _, i, k = best
        choice[i] = k
        total = total_costs(points, choice)
    return choice


def _excess(total: np.ndarray, caps: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """By how much the caps are exceeded, in shares of each, together."""
    return (np.maximum(total - caps, 0.0) / unit).sum(-1)


def _tightest(points: Sequence[Points], caps: np.ndarray, active: Sequence[int]) -> list[int]:
    """A choice within the caps, looked for as the least of one cost within the other caps.

    Raises:
        TooTight: none was found; it tells the limit that is missed by least.
    """
    missed: list[tuple[float, int, float]] = []
    for j in active:
        others = caps.copy()
        others[j] = np.inf
        choice = minimise_distortion([replace(p, objective=p.costs[:, j]) for p in points], others)
        total = float(total_costs(points, choice)[j])
        if total <= caps[j]:
            return choice
        missed.append((total / max(caps[j], 1.0), j, total))
    _, j, total = min(missed)
    raise TooTight(j, total)


def _spend(points: Sequence[Points], choice: list[int], caps: np.ndarray) -> list[int]:
    """Use what is left of the budget: the best affordable improvement first."""
    choice = list(choice)
    left = caps - total_costs(points, choice)
    unit = np.where(np.isfinite(caps), np.maximum(caps, 1.0), np.inf)

    def improvement(i: int) -> tuple[float, int] | None:
        p, k = points[i], choice[i]
        extra = p.costs - p.costs[k]
        gain = p.objective[k] - p.objective
        fits = (gain > 0) & np.all(extra <= left, axis=1)
        if not fits.any():
            return None
        price = np.maximum((extra / unit).max(1), 1e-18)
        rate = np.where(fits, gain / price, -np.inf)
        best = int(np.argmax(rate))
        return float(rate[best]), best

    def queue() -> list[tuple[float, int, int]]:
        improved = ((i, improvement(i)) for i in range(len(points)))
        return sorted((-found[0], i, found[1]) for i, found in improved if found)

    # Queued again at the end: a step may have freed what another limit counts.
    while heap := queue():
        while heap:
            rate, i, _ = heapq.heappop(heap)
            found = improvement(i)
            if found is None:
                continue
            if -found[0] > rate + 1e-12 * abs(rate):  # it got worse since it was queued
                heapq.heappush(heap, (-found[0], i, found[1]))
                continue
            left = left - (points[i].costs[found[1]] - points[i].costs[choice[i]])
            choice[i] = found[1]
            again = improvement(i)
            if again:
                heapq.heappush(heap, (-again[0], i, again[1]))
    return choice


def minimise_cost(points: Sequence[Points], ceiling: float | None) -> list[int]:
    """The fewest parameters with the sum of distortions within ``ceiling`` (None: no limit).

    Where even the least distortion is above the ceiling, that is the choice.
    """
    smallest = [int(np.argmin(p.costs[:, 0])) for p in points]
    if ceiling is None or total_distortion(points, smallest) <= ceiling:
        return smallest
    caps = np.full(points[0].costs.shape[1] if points else 0, np.inf)
    choice = minimise_distortion(points, caps)
    low, high = (float(total_costs(points, found)[0]) for found in (smallest, choice))
    while high - low > max(1.0, 1e-5 * high):
        caps[0] = (low + high) / 2
        trial = minimise_distortion(points, caps)
        if total_distortion(points, trial) <= ceiling:
            high, choice = float(total_costs(points, trial)[0]), trial
        else:
            low = caps[0]
    return choice
