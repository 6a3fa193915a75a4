"""One global choice of formats and ranks under a budget: rate-distortion optimisation.

Every weight brings its points (cost, distortion). For a multiplier λ each weight takes the point
with the least distortion + λ·cost, independently of the others; bisection on λ meets the budget
(Shoham & Gersho 1988). That is the optimum of the problem relaxed to the lower convex hulls; what
is left of the budget is then spent greedily, the best improvement for its cost first.

Several limits on costs are one: λ becomes one multiplier a limit, found by coordinate bisection.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tensorize.budget import Budget
from tensorize.errors import AnalysisError, BudgetError
from tensorize.ir import DENSE, LOW_RANK, TT, Plan, Prediction, RankPlan, Site, Totals, TTSpec
from tensorize.passes.order import plan_contraction
from tensorize.passes.pipeline import Program
from tensorize.passes.sites import matches, require_match
from tensorize.passes.spectra import Spectrum

COSTS = ("params", "bytes", "flops")
RanksOption = Mapping[str, int | str] | None

# Without a loss, errors of different weights have no common unit. Distortion is divided by the
# weight's own size to this power: 0 compares absolute errors, 1 relative ones; each of the two
# fails badly on some trained model (docs/design.md), the geometric mean of both on none tried.
_RELATIVE = 0.5


@dataclass(frozen=True)
class Points:
    """The points of one weight, by growing parameters.

    ``costs`` is (P, 3), ``distortion`` what a point adds to the predicted loss, ``objective`` what
    the allocation minimises, ``errors`` the weight's relative error. ``labels`` says what a point
    is: 0 dense, r > 0 low rank of rank r, -k the k-th of ``others``.
    """

    site: Site
    costs: np.ndarray
    distortion: np.ndarray
    objective: np.ndarray
    errors: np.ndarray
    labels: np.ndarray
    others: tuple[TTSpec, ...] = ()
    fixed: str | None = None

    def spec(self, k: int) -> TTSpec | None:
        """The factorization at point k; None is the dense weight."""
        label = int(self.labels[k])
        if label > 0:
            return TTSpec.low_rank(*self.site.matrix, label, experts=self.site.experts)
        return None if label == 0 else self.others[-label - 1]

    def only(self, keep: np.ndarray) -> Points:
        """The same weight with fewer points."""
        return replace(
            self,
            costs=self.costs[keep],
            distortion=self.distortion[keep],
            objective=self.objective[keep],
            errors=self.errors[keep],
            labels=self.labels[keep],
        )


@dataclass(frozen=True)
class Allocate:
    """Program with ``plan``.

    ``ranks`` overrides the allocation (pattern → rank or "full"); with ``budget=None`` the sites
    that it does not name stay dense.
    """

    budget: Budget | None
    ranks: RanksOption = None
    formats: Mapping[str, tuple[str, ...]] | None = None
    batch_sizes: tuple[int, ...] = (1, 16, 256)
    fingerprint: str = ""
    name: str = "allocate"

    def run(self, program: Program) -> Program:
        dense = dense_totals(program)
        points = self._points(program)
        overhead = _overhead(program)
        choice = self._choose(points, overhead, dense, program)
        plan = self._plan(program, points, choice, overhead, dense)
        kept = plan.predicted.parameters / dense.parameters
        factorized = sum(site.spec is not None for site in plan.sites)
        summary = f"{factorized} weights factorized, {100 * kept:.2f} % of the parameters kept"
        return replace(program, plan=plan, summary=summary)

    # ---------------------------------------------------------------------------- the points

    def _points(self, program: Program) -> list[Points]:
        overrides = _overrides(program.sites, self.ranks)
        result = []
        for site in program.sites:
            curve = program.spectra.get(site.name)
            itemsize = _itemsize(site)
            forced = overrides.get(site.name)
            if curve is None or site.blocked is not None:
                if forced is not None:
                    raise AnalysisError(
                        f"ranks= names a weight that stays dense: {site.blocked}",
                        site=site.name,
                        way_out="leave it out of ranks=",
                    )
                result.append(_dense_point(site, itemsize, site.blocked or "no curve"))
                continue
            if forced is not None:
                allowed = curve.formats if self.formats is None else self.formats[site.name]
                result.append(_forced_point(curve, forced, itemsize, self.batch_sizes, allowed))
            elif self.budget is None:
                result.append(_dense_point(site, itemsize, "not named by ranks="))
            else:
                allowed = curve.formats if self.formats is None else self.formats[site.name]
                result.append(_curve_points(curve, allowed, itemsize, self.batch_sizes))
        return result

    # ---------------------------------------------------------------------------- the choice

    def _choose(
        self, points: list[Points], overhead: np.ndarray, dense: Totals, program: Program
    ) -> list[int]:
        if self.budget is None:
            return [0] * len(points)
        budget = self.budget
        if budget.error is not None:
            points[:] = _within_error(points, budget.error)
        limits = budget.limits(dense)
        caps = np.array([limits.get(cost, np.inf) for cost in COSTS]) - overhead
        _check_feasible(points, caps, overhead, limits, dense)
        ceiling = self._distortion_limit(program)
        try:
            choice = minimise_distortion(points, caps)
        except _TooTight as tight:
            j, need = tight.cost, int(tight.total + overhead[tight.cost])
            raise BudgetError(
                f"the limits of {budget} cannot be met together: within the others, the smallest "
                f"{COSTS[j]} found is {need:,}",
                way_out=f"{COSTS[j]}={need}, or a larger limit on what it is traded for",
            ) from None
        if ceiling is not None and _lost(points, choice) > ceiling:
            reached = program.predictor.predict(_lost(points, choice))[0]
            raise BudgetError(
                f"no choice within {budget} keeps the predicted rise of the loss: the "
                f"smallest reached is {reached:.4g}",
                site=_largest(points, choice),
                way_out=f"allow loss={reached * 1.01:.4g}, a larger size, or more formats=",
            )
        return choice if limits else minimise_cost(points, ceiling)

    def _distortion_limit(self, program: Program) -> float | None:
        """The largest sum of distortions whose predicted loss is within the budget."""
        assert self.budget is not None
        if self.budget.loss is None:
            return None
        if program.predictor is None:
            raise BudgetError(
                "a limit on the loss needs to know the loss",
                way_out="pass calibration data (and no metric= but 'loss')",
            )
        return program.predictor.inverse(self.budget.loss)

    # ------------------------------------------------------------------------------ the plan

    def _plan(
        self,
        program: Program,
        points: list[Points],
        choice: list[int],
        overhead: np.ndarray,
        dense: Totals,
    ) -> Plan:
        used = overhead + sum(p.costs[k] for p, k in zip(points, choice, strict=True))
        lost = _lost(points, choice)
        sites = tuple(
            RankPlan(
                name=p.site.name,
                kind=p.site.kind,
                shape=p.site.shape,
                spec=p.spec(k),
                predicted_error=float(p.errors[k]),
                predicted_loss=float(p.distortion[k]),
                reason=_reason(p, k),
            )
            for p, k in zip(points, choice, strict=True)
        )
        loss, interval = None, None
        error = max((site.predicted_error for site in sites), default=0.0)
        if program.predictor is not None:
            loss, interval = program.predictor.predict(lost)
            error = program.predictor.output_error(loss)
        predicted = Prediction(
            parameters=int(used[0]),
            bytes=int(used[1]),
            flops=int(used[2]),
            output_error=error,
            loss=loss,
            loss_interval=interval,
        )
        return Plan(
            sites=sites,
            budget="none" if self.budget is None else str(self.budget),
            metric=program.metric,
            predicted=predicted,
            dense=dense,
            batch_sizes=self.batch_sizes,
            seed=program.seed,
            fingerprint=self.fingerprint,
            notes=program.notes,
        )


# ------------------------------------------------------------------------------------ the costs


def _itemsize(site: Site) -> int:
    return torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()


def dense_flops(site: Site) -> int:
    """FLOPs of one input row of every matmul use of the dense weight; a lookup costs none."""
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    return sum(2 * m * n for use in site.uses if use.contract != "lookup")


def spec_flops(site: Site, spec: TTSpec, batch_sizes: Sequence[int]) -> int:
    """FLOPs of one input row through the cores, the worst over the batch sizes."""
    m, n = site.matrix
    if spec.format == LOW_RANK:
        (rank,) = spec.ranks
        return sum(2 * rank * (n if u.contract == "lookup" else m + n) for u in site.uses)
    total = 0
    for use in site.uses:
        if use.contract == "lookup":
            total += _lookup_flops(spec)
            continue
        plan = plan_contraction(spec, use.contract)
        total += max(-(-plan.flops(batch) // batch) for batch in batch_sizes)
    return total


def _lookup_flops(spec: TTSpec) -> int:
    flops, columns = 0, spec.column_modes[0]
    for k, rank in enumerate(spec.ranks):
        after = spec.ranks[k + 1] if k + 1 < len(spec.ranks) else 1
        flops += 2 * columns * rank * spec.column_modes[k + 1] * after
        columns *= spec.column_modes[k + 1]
    return flops


def dense_totals(program: Program) -> Totals:
    """Parameters and bytes of the whole dense model, each parameter once; FLOPs of its matmuls."""
    return Totals(
        parameters=sum(elements for elements, _ in program.sizes.values()),
        bytes=sum(size for _, size in program.sizes.values()),
        flops=sum(dense_flops(site) for site in program.sites),
    )


def _overhead(program: Program) -> np.ndarray:
    """Parameters and bytes of everything that is no site: biases, norms, scales."""
    listed = {site.name for site in program.sites}
    rest = [size for name, size in program.sizes.items() if name not in listed]
    return np.array([sum(n for n, _ in rest), sum(b for _, b in rest), 0.0])


def _costs(site: Site, spec: TTSpec, itemsize: int, batch_sizes: Sequence[int]) -> list[int]:
    return [
        spec.parameters,
        spec.parameters * itemsize,
        spec_flops(site, spec, batch_sizes),
    ]


def _dense_costs(site: Site, itemsize: int) -> list[int]:
    return [site.parameters, site.parameters * itemsize, dense_flops(site)]


def _dense_point(site: Site, itemsize: int, reason: str) -> Points:
    zero = np.zeros(1)
    costs = np.array([_dense_costs(site, itemsize)], dtype=float)
    return Points(site, costs, zero, zero, zero, np.zeros(1, int), fixed=reason)


def _scale(curve: Spectrum) -> float:
    """What turns a curve's distortion into the unit in which weights are compared."""
    if curve.in_nats:
        return 1.0
    whole = float(curve.distortion[0])
    return whole**-_RELATIVE if whole > 0 else 1.0


def _curve_points(
    curve: Spectrum, allowed: Sequence[str], itemsize: int, batch_sizes: Sequence[int]
) -> Points:
    site = curve.site
    m, n = site.matrix
    count = max(site.experts, 1)
    ranks = np.arange(1, curve.left.shape[-1] + 1) if LOW_RANK in allowed else np.arange(0)
    ranks = ranks[ranks * (m + n) < m * n]
    others = tuple(spec for spec, _ in curve.train_points) if TT in allowed else ()
    flops = sum(n if use.contract == "lookup" else m + n for use in site.uses)
    parameters = ranks * (m + n) * count
    rows = [np.stack([parameters, parameters * itemsize, 2 * ranks * flops], axis=1)]
    lost = [curve.distortion.numpy()[ranks]]
    labels = [ranks]
    if others:
        rows.append(np.array([_costs(site, spec, itemsize, batch_sizes) for spec in others]))
        lost.append(np.array([loss for _, loss in curve.train_points]))
        labels.append(-1 - np.arange(len(others)))
    reason = None
    if len(ranks) + len(others) == 0:
        reason = f"no rank of {', '.join(f for f in allowed if f != DENSE)} saves parameters"
    if DENSE in allowed or reason:
        rows.append(np.array([_dense_costs(site, itemsize)]))
        lost.append(np.zeros(1))
        labels.append(np.zeros(1, int))
    costs, distortion = np.concatenate(rows).astype(float), np.concatenate(lost)
    order = np.lexsort((distortion, costs[:, 0]))
    costs, distortion = costs[order], distortion[order]
    whole = float(curve.distortion[0])
    return Points(
        site,
        costs,
        distortion if curve.in_nats else np.zeros_like(distortion),
        distortion * _scale(curve),
        np.sqrt(np.maximum(distortion, 0) / whole) if whole > 0 else np.zeros_like(distortion),
        np.concatenate(labels)[order],
        others,
        fixed=reason,
    )


def _forced_point(
    curve: Spectrum,
    rank: int | str,
    itemsize: int,
    batch_sizes: Sequence[int],
    allowed: Sequence[str],
) -> Points:
    """The one point that ``ranks=`` asks for."""
    site = curve.site
    m, n = site.matrix
    if TT in allowed and LOW_RANK not in allowed and curve.trains:
        exact = curve.trains[0].spec
        cut = exact.ranks if rank == "full" else [min(int(rank), r) for r in exact.ranks]
        spec = exact.with_ranks(cut)
    else:
        size = min(m, n) if rank == "full" else min(int(rank), m, n)
        spec = TTSpec.low_rank(m, n, size, experts=site.experts)
    lost = curve.distortion_of(spec)
    return Points(
        site,
        np.array([_costs(site, spec, itemsize, batch_sizes)], dtype=float),
        np.array([lost if curve.in_nats else 0.0]),
        np.array([lost]),
        np.array([curve.error(lost)]),
        np.array([-1]),
        (spec,),
        fixed=f"ranks={rank!r}",
    )


def _overrides(sites: Sequence[Site], ranks: RanksOption) -> dict[str, int | str]:
    if ranks is None:
        return {}
    require_match(sites, list(ranks), "ranks")
    chosen: dict[str, int | str] = {}
    for pattern, rank in ranks.items():
        good = rank == "full" or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
        if not good:
            raise AnalysisError(
                f"ranks[{pattern!r}] must be a positive integer or 'full', got {rank!r}"
            )
        exact = {site.name for site in sites if pattern in site.names}
        for site in sites:
            named = site.name in exact if exact else matches(site, pattern)
            if named and (site.blocked is None or exact):
                chosen.setdefault(site.name, rank)
    return chosen


# ------------------------------------------------------------------------------ optimisation


def _within_error(points: Sequence[Points], error: float) -> list[Points]:
    """Only the points of each weight whose relative error is within the limit."""
    worst = max(points, key=lambda p: p.errors.min(), default=None)
    if worst is not None and worst.errors.min() > error:
        least = worst.errors.min() * 1.001  # printed with few digits, it must still be enough
        raise BudgetError(
            f"no allowed point has an error within {error:g}: the smallest is {least:.4g}",
            site=worst.site.name,
            way_out=f"error={least:.4g}, or allow 'dense' in formats=",
        )
    return [p.only(np.flatnonzero(p.errors <= error)) for p in points]


def _check_feasible(
    points: Sequence[Points],
    caps: np.ndarray,
    overhead: np.ndarray,
    limits: Mapping[str, float],
    dense: Totals,
) -> None:
    whole = (dense.parameters, dense.bytes, dense.flops)
    for j, cost in enumerate(COSTS):
        least = [float(p.costs[:, j].min()) for p in points]
        if sum(least) <= caps[j]:
            continue
        need = int(sum(least) + overhead[j])
        fixed = sorted(
            ((value, p) for value, p in zip(least, points, strict=True) if p.fixed),
            key=lambda pair: -pair[0],
        )
        blocking = [f"{p.site.name} ({int(v):,}: {p.fixed})" for v, p in fixed[:3] if v > 0]
        if overhead[j]:
            blocking.append(f"biases, norms and other small parameters ({int(overhead[j]):,})")
        share = np.ceil(need / whole[j] * 1e4) / 1e4  # with four digits, still enough
        short = cost == "params" and share <= 1
        raise BudgetError(
            f"{cost} cannot be within {limits[cost]:,.0f}: the smallest feasible value is "
            f"{need:,} ({need / whole[j]:.4f} of the dense model); in the way: "
            f"{'; '.join(blocking) or 'every weight is at its smallest rank already'}",
            site=fixed[0][1].site.name if fixed else None,
            way_out=f"budget={f'{share:.4f}' if short else f'tensorize.Budget({cost}={need})'}, "
            "or allow more weights to be factorized (include=, exclude=, formats=)",
        )


def _lost(points: Sequence[Points], choice: Sequence[int]) -> float:
    return float(sum(p.distortion[k] for p, k in zip(points, choice, strict=True)))


def _largest(points: Sequence[Points], choice: Sequence[int]) -> str:
    return max(zip(points, choice, strict=True), key=lambda pair: pair[0].distortion[pair[1]])[
        0
    ].site.name


def _best(points: Sequence[Points], multipliers: np.ndarray) -> list[int]:
    """Each weight's point of least objective + λ · cost; the cheaper one where two are equal."""
    return [int(np.argmin(p.objective + p.costs @ multipliers)) for p in points]


def _total(points: Sequence[Points], choice: Sequence[int]) -> np.ndarray:
    return np.sum([p.costs[k] for p, k in zip(points, choice, strict=True)], axis=0)


def minimise_distortion(points: Sequence[Points], caps: np.ndarray) -> list[int]:
    """The least objective with every total cost within its cap (caps may be infinite)."""
    if not points:
        return []
    multipliers = np.zeros(len(COSTS))
    active = [j for j in range(len(COSTS)) if np.isfinite(caps[j])]
    choice = _best(points, multipliers)
    for _ in range(8):  # coordinate bisection: one pass is exact for one limit
        before = multipliers.copy()
        for j in active:
            choice = _bisect(points, multipliers, j, caps[j])
        if len(active) == 1 or np.allclose(before, multipliers, rtol=1e-3):
            break
    if not np.all(_total(points, choice) <= caps):
        choice = _repair(points, choice, caps) or _tightest(points, caps, active)
    return _spend(points, choice, caps)


class _TooTight(Exception):
    """No choice was found within all caps; within the others, ``cost`` can be as low as ``total``."""

    def __init__(self, cost: int, total: float) -> None:
        super().__init__(cost, total)
        self.cost, self.total = cost, total


def _bisect(points: Sequence[Points], multipliers: np.ndarray, j: int, cap: float) -> list[int]:
    """The smallest multiplier j (changed in place) whose choice is within the cap."""

    def at(value: float) -> list[int]:
        multipliers[j] = value
        return _best(points, multipliers)

    choice = at(0.0)
    if _total(points, choice)[j] <= cap:
        return choice
    high = 1e-30
    while _total(points, choice := at(high))[j] > cap and high < 1e30:
        high *= 1e3
    low = high / 1e3
    for _ in range(100):
        middle = (low * high) ** 0.5
        if _total(points, at(middle))[j] <= cap:
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
    total = _total(points, choice)
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
        total = _total(points, choice)
    return choice


def _excess(total: np.ndarray, caps: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """By how much the caps are exceeded, in shares of each, together."""
    return (np.maximum(total - caps, 0.0) / unit).sum(-1)


def _tightest(points: Sequence[Points], caps: np.ndarray, active: Sequence[int]) -> list[int]:
    """A choice within the caps, looked for as the least of one cost within the other caps.

    Raises:
        _TooTight: none was found; it tells the limit that is missed by least.
    """
    missed: list[tuple[float, int, float]] = []
    for j in active:
        others = caps.copy()
        others[j] = np.inf
        choice = minimise_distortion([replace(p, objective=p.costs[:, j]) for p in points], others)
        total = float(_total(points, choice)[j])
        if total <= caps[j]:
            return choice
        missed.append((total / max(caps[j], 1.0), j, total))
    _, j, total = min(missed)
    raise _TooTight(j, total)


def _spend(points: Sequence[Points], choice: list[int], caps: np.ndarray) -> list[int]:
    """Use what is left of the budget: the best affordable improvement first."""
    choice = list(choice)
    left = caps - _total(points, choice)
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
    if ceiling is None or _lost(points, smallest) <= ceiling:
        return smallest
    caps = np.full(len(COSTS), np.inf)
    choice = minimise_distortion(points, caps)
    low, high = (float(_total(points, found)[0]) for found in (smallest, choice))
    while high - low > max(1.0, 1e-5 * high):
        caps[0] = (low + high) / 2
        trial = minimise_distortion(points, caps)
        if _lost(points, trial) <= ceiling:
            high, choice = float(_total(points, trial)[0]), trial
        else:
            low = caps[0]
    return choice


def _reason(points: Points, k: int) -> str:
    if points.fixed is not None:
        return points.fixed
    if points.spec(k) is None:
        return "dense: its parameters are worth more here than in other weights"
    return "rank chosen by the budget"
