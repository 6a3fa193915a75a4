"""One global choice of formats and ranks under a budget: rate-distortion optimisation.

Every weight brings its points (``points.py``), ``optimise.py`` chooses one of each, and what is
chosen becomes the plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan, Prediction, Totals
from tensorize.ir.sites import Site
from tensorize.passes.allocate.candidates import (
    COSTS,
    Points,
    curve_points,
    dense_point,
    dense_totals,
    forced_point,
    other_costs,
    scales,
)
from tensorize.passes.allocate.feasible import check_feasible, within_error
from tensorize.passes.allocate.flops import element_size
from tensorize.passes.allocate.groups import group_points
from tensorize.passes.allocate.optimise import (
    Solution,
    TooTight,
    minimise_cost,
    solve,
    total_distortion,
)
from tensorize.passes.allocate.slower import WORTH, slow_choices, without_slow_points
from tensorize.passes.curves.formats import joins
from tensorize.passes.observe.select import matches, require_match
from tensorize.passes.stages import Analysed, Planned

RanksOption = Mapping[str, int | str] | None

BATCH_SIZES = (1, 16, 256)
"""Input rows at which FLOPs and times are counted where nothing is said: a token, a few, many."""


@dataclass(frozen=True)
class Allocate:
    """Chooses formats and ranks: the plan.

    ``ranks`` overrides the allocation (pattern → rank or "full"); with ``budget=None`` the sites
    that it does not name stay dense. ``pivots``: low rank does not store what a change of basis can
    remove.
    """

    budget: Budget | None
    ranks: RanksOption = None
    formats: Mapping[str, tuple[str, ...]] | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    refine: str | None = None
    rank_multiple: int = 1
    fingerprint: str = ""
    pivots: bool = True
    name: str = "allocate"

    def __post_init__(self) -> None:
        several = isinstance(self.batch_sizes, Sequence) and len(self.batch_sizes) > 0
        if not several or any(not isinstance(b, int) or b < 1 for b in self.batch_sizes):
            raise BudgetError(
                f"batch_sizes must be positive integers, got {self.batch_sizes!r}",
                way_out=f"batch_sizes={BATCH_SIZES}",
            )
        if not isinstance(self.rank_multiple, int) or self.rank_multiple < 1:
            raise BudgetError(
                f"rank_multiple must be a positive integer, got {self.rank_multiple!r}",
                way_out="rank_multiple=8",
            )

    def run(self, analysed: Analysed) -> Planned:
        dense = dense_totals(analysed, self.batch_sizes)
        overhead = other_costs(analysed, self.batch_sizes)
        points = self._points(analysed, last_resort=False)
        try:
            solution = self._choose(points, overhead, dense, analysed)
        except BudgetError:
            if not any(site.last_resort and site.blocked is None for site in analysed.sites):
                raise
            points = self._points(analysed, last_resort=True)
            solution = self._choose(points, overhead, dense, analysed)
        plan = self._plan(analysed, points, solution, overhead, dense)
        kept = plan.predicted.parameters / dense.parameters
        factorized = sum(site.spec is not None for site in plan.sites)
        summary = f"{factorized} weights factorized, {100 * kept:.2f} % of the parameters kept"
        return analysed.to(Planned, plan=plan, summary=summary)

    # ---------------------------------------------------------------------------- the points

    def _points(self, analysed: Analysed, *, last_resort: bool) -> list[Points]:
        overrides = _overrides(analysed.sites, self.ranks)
        load, scale = (self.batch_sizes, analysed.machine), scales(analysed)
        result = []
        for site in analysed.sites:
            curve = analysed.spectra.get(site.name)
            itemsize = element_size(site)
            forced = overrides.get(site.name)
            if curve is None or site.blocked is not None:
                if forced is not None:
                    raise AnalysisError(
                        f"ranks= names a weight that stays dense: {site.blocked}",
                        site=site.name,
                        way_out="leave it out of ranks=",
                    )
                result.append(dense_point(site, itemsize, site.blocked or "no curve", *load))
                continue
            if forced is not None:
                allowed = curve.formats if self.formats is None else self.formats[site.name]
                result.append(
                    forced_point(
                        *(curve, forced, itemsize, load[0], allowed, load[1]), pivots=self.pivots
                    )
                )
            elif site.last_resort and not last_resort:
                result.append(dense_point(site, itemsize, site.last_resort, *load))
            elif self.budget is None:
                result.append(dense_point(site, itemsize, "not named by ranks=", *load))
            else:
                allowed = curve.formats if self.formats is None else self.formats[site.name]
                given = curve, allowed, itemsize, load[0], self.rank_multiple, load[1]
                result.append(curve_points(*given, scale[site.name], pivots=self.pivots))
        names = {
            site.name
            for site in analysed.sites
            if self.formats is None or joins(self.formats.get(site.name, ()))
        }
        return _grouped(result, analysed, names, scale, self.rank_multiple, self.batch_sizes)

    @property
    def _cost_names(self) -> tuple[str, ...]:
        return (*COSTS, *(f"latency[{k}]" for k in range(len(self.batch_sizes))))

    # ---------------------------------------------------------------------------- the choice

    def _choose(
        self, points: list[Points], overhead: np.ndarray, dense: Totals, analysed: Analysed
    ) -> Solution:
        if self.budget is None:
            return Solution([0] * len(points), 0.0, 0.0)
        budget = self.budget
        if budget.error is not None:
            points[:] = within_error(points, budget.error)
        limits = budget.limits(dense)
        names = self._cost_names
        caps = np.array([limits.get(cost, np.inf) for cost in names]) - overhead
        check_feasible(names, points, caps, overhead, limits, dense)
        ceiling = self._distortion_limit(analysed)
        try:
            solution = solve(points, caps)
        except TooTight as tight:
            need = math.ceil(tight.total + overhead[tight.cost])
            cost = names[tight.cost].partition("[")[0]
            raise BudgetError(
                f"the limits of {budget} cannot be met together: within the others, the smallest "
                f"{cost} found is {need:,}",
                way_out=f"{cost}={need}, or a larger limit on what it is traded for",
            ) from None
        lost = total_distortion(points, solution.choice)
        if ceiling is not None and lost > ceiling:
            assert analysed.predictor is not None  # the limit on the loss comes from it
            reached = analysed.predictor.predict(lost, self.refine)[0]
            raise BudgetError(
                f"no choice within {budget} keeps the predicted rise of the loss: the "
                f"smallest reached is {reached:.4g}",
                site=_largest(points, solution.choice),
                way_out=f"allow loss={reached * 1.01:.4g}, a larger size, or more formats=",
            )
        if not limits:
            solution = Solution(minimise_cost(points, ceiling), 0.0, 0.0)
        if budget.latency is not None:
            return solution
        return self._not_slower(points, caps, ceiling, solution, analysed)

    def _not_slower(
        self,
        points: list[Points],
        caps: np.ndarray,
        ceiling: float | None,
        solution: Solution,
        analysed: Analysed,
    ) -> Solution:
        """A choice without weights slower than dense, where that costs next to nothing.

        What it costs is distortion where the size is limited, else parameters.
        """
        given = points, solution.choice, self.batch_sizes, analysed.machine
        fast = without_slow_points(*given)
        if fast is None or (np.sum([p.costs.min(0) for p in fast], axis=0) > caps).any():
            return solution
        limited = bool(np.isfinite(caps).any())
        try:
            found = solve(fast, caps) if limited else Solution(minimise_cost(fast, ceiling), 0, 0)
        except TooTight:
            return solution

        def price(those: Sequence[Points], choice: Sequence[int]) -> float:
            return sum(
                float(p.objective[k] if limited else p.costs[k, 0])
                for p, k in zip(those, choice, strict=True)
            )

        if price(fast, found.choice) > WORTH * price(points, solution.choice):
            return solution
        if ceiling is not None and total_distortion(fast, found.choice) > ceiling:
            return solution
        points[:] = fast
        return found

    def _distortion_limit(self, analysed: Analysed) -> float | None:
        """The largest sum of distortions whose predicted loss is within the budget."""
        assert self.budget is not None
        if self.budget.loss is None:
            return None
        if analysed.predictor is None:
            raise BudgetError(
                "a limit on the loss needs to know the loss",
                way_out="pass calibration data (and no metric= but 'loss')",
            )
        return analysed.predictor.inverse(self.budget.loss, self.refine)

    # ------------------------------------------------------------------------------ the plan

    def _plan(
        self,
        analysed: Analysed,
        points: list[Points],
        solution: Solution,
        overhead: np.ndarray,
        dense: Totals,
    ) -> Plan:
        choice = solution.choice
        used = overhead + sum(p.costs[k] for p, k in zip(points, choice, strict=True))
        lost = total_distortion(points, choice)
        chosen = {s.name: s for p, k in zip(points, choice, strict=True) for s in p.plans(k)}
        slow = slow_choices(
            analysed.sites, list(chosen.values()), self.batch_sizes, analysed.machine
        )
        for name, found in slow.items():
            batches = ", ".join(f"{each.batch:,}" for each in found)
            reason = f"{chosen[name].reason}; slower than dense at {batches} rows"
            chosen[name] = replace(chosen[name], reason=reason)
        sites = tuple(chosen[site.name] for site in analysed.sites)
        loss, interval = None, None
        error = max((site.predicted_error for site in sites), default=0.0)
        if analysed.predictor is not None:
            loss, interval = analysed.predictor.predict(lost, self.refine)
            error = analysed.predictor.output_error(loss)
        predicted = Prediction(
            parameters=int(used[0]),
            bytes=int(used[1]),
            flops=int(used[2]),
            output_error=error,
            loss=loss,
            loss_interval=interval,
            latency=tuple(float(t) for t in used[len(COSTS) :]),
        )
        return Plan(
            sites=sites,
            budget="none" if self.budget is None else str(self.budget),
            metric=analysed.metric,
            predicted=predicted,
            dense=dense,
            batch_sizes=tuple(self.batch_sizes),
            limits_errors=self.budget is not None and self.budget.error is not None,
            seed=analysed.seed,
            fingerprint=self.fingerprint,
            refine=self.refine,
            gap=solution.gap,
            machine=analysed.machine.name,
            notes=analysed.notes,
        )


def smallest_share(analysed: Analysed) -> float:
    """The share of a model's parameters that is left where every weight is as small as can be."""
    points = Allocate(Budget(params=1.0))._points(analysed, last_resort=True)
    least = sum(float(p.costs[:, 0].min()) for p in points) + float(other_costs(analysed)[0])
    return least / max(dense_totals(analysed).parameters, 1)


def check_ranks(ranks: RanksOption) -> RanksOption:
    """What ``ranks=`` is; raises AnalysisError for what it cannot be, whatever the model."""
    if ranks is not None and not isinstance(ranks, Mapping):
        raise AnalysisError(
            f"ranks= maps patterns to ranks, got {ranks!r}", way_out='ranks={"*": 8}'
        )
    for pattern, rank in (ranks or {}).items():
        good = rank == "full" or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
        if not good:
            raise AnalysisError(
                f"ranks[{pattern!r}] must be a positive integer or 'full', got {rank!r}",
                way_out=f"ranks={{{pattern!r}: 8}}",
            )
    return ranks


def _overrides(sites: Sequence[Site], ranks: RanksOption) -> dict[str, int | str]:
    check_ranks(ranks)
    require_match(sites, list(ranks or {}), "ranks")
    chosen: dict[str, int | str] = {}
    for pattern, rank in (ranks or {}).items():
        exact = {site.name for site in sites if pattern in site.names}
        named = [s for s in sites if (s.name in exact if exact else matches(s, pattern))]
        free = named if exact else [s for s in named if not (s.blocked or s.last_resort)]
        if not free:
            raise AnalysisError(
                f"ranks[{pattern!r}] names only weights that stay dense: "
                f"{named[0].blocked or named[0].last_resort}",
                site=named[0].name,
                way_out="name one of them in full, where it can be factorized, or leave it out",
            )
        for site in free:
            chosen.setdefault(site.name, rank)
    return chosen


def _largest(points: Sequence[Points], choice: Sequence[int]) -> str:
    return max(zip(points, choice, strict=True), key=lambda pair: pair[0].distortion[pair[1]])[
        0
    ].site.name


def _grouped(
    points: Sequence[Points],
    analysed: Analysed,
    allowed: Collection[str],
    scale: Mapping[str, float],
    rank_multiple: int,
    batch_sizes: Sequence[int],
) -> list[Points]:
    """Weights of one input as one choice, where they may share a first factor and gain by it."""
    result = {p.site.name: p for p in points}
    groups: dict[str, list[Points]] = defaultdict(list)
    for p in points:
        curve = analysed.spectra.get(p.site.name)
        if p.fixed is None and curve is not None and curve.shared and p.site.name in allowed:
            groups[p.site.input_group or ""].append(p)
    for members in groups.values():
        curves = [analysed.spectra[p.site.name] for p in members]
        load = [scale[p.site.name] for p in members], rank_multiple, batch_sizes, analysed.machine
        if len(members) > 1 and (group := group_points(members, curves, *load)):
            for p in members:
                del result[p.site.name]
            result[group.site.name] = group
    return list(result.values())
