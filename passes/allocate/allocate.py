"""One global choice of formats and ranks under a budget: rate-distortion optimisation.

Every weight brings its points (``candidates.py``). ``optimise.py`` makes the choices of one of
each that any budget may get, ``choose.py`` finds that of a budget among them, and it becomes the
plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan, Prediction
from tensorize.ir.sites import Site
from tensorize.passes.allocate.alike import together
from tensorize.passes.allocate.candidates import (
    COSTS,
    Points,
    curve_points,
    dense_point,
    dense_totals,
    forced_point,
    other_costs,
    scales,
    takes_ranks,
)
from tensorize.passes.allocate.choose import Chosen, least_lost_in_file
from tensorize.passes.allocate.demand import SLOWER, Demand
from tensorize.passes.allocate.feasible import refusal
from tensorize.passes.allocate.flops import element_size
from tensorize.passes.allocate.forms import BITS
from tensorize.passes.allocate.groups import group_points
from tensorize.passes.allocate.inputs import Inputs
from tensorize.passes.allocate.slower import slow_choices, with_excess, without_slow_points
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.filed import Filed, first_theta
from tensorize.passes.curves.formats import joins
from tensorize.passes.curves.precisions import PrecisionOption, integers, takes_own
from tensorize.passes.observe.select import matches, require_match
from tensorize.passes.stages import Analysed, Planned

RanksOption = Mapping[str, int | str] | None

BATCH_SIZES = (1, 16, 256)
"""Input rows at which FLOPs and times are counted where nothing is said: a token, a few, many."""


@dataclass(frozen=True)
class Allocate:
    """Chooses formats and ranks: the plan.

    ``ranks`` overrides the allocation (pattern → rank or "full"); with ``budget=None`` the sites
    that it does not name stay dense. ``even``: weights that nothing tells apart get the same.
    ``notes`` are for the plan; ``pivots``: where the machine can run it, low rank need not store
    what a change of basis can remove; ``always``: wherever it need not it does not.
    ``activations``: what inputs of quantized weights are rounded to, of ``INPUTS`` (None: what is
    good and fast).
    """

    budget: Budget | None
    ranks: RanksOption = None
    formats: Mapping[str, tuple[str, ...]] | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    refine: str | None = None
    rank_multiple: int = 1
    fingerprint: str = ""
    even: bool = False
    notes: tuple[str, ...] = ()
    pivots: bool = True
    always: bool = False
    precision: PrecisionOption = None
    activations: str | None = None
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
        if self.budget is None:
            points = self._points(analysed, last_resort=False)
            return self._planned(self._predicting(analysed), Chosen(points, [0] * len(points), 0.0))
        return self.within(self._demand_of(analysed))

    def within(self, demand: Demand) -> Planned:
        """The plan for the budget, of what was asked of others before: it is the same for all that
        differ in nothing else, and limit no file."""
        assert self.budget is not None
        budget = self.budget.of_bytes
        found = demand.choose(budget)
        if found is None:
            raise refusal(demand, budget)
        return self._planned(demand.analysed, found)

    def _planned(self, analysed: Analysed, chosen: Chosen) -> Planned:
        plan = self._plan(analysed, chosen)
        kept = plan.predicted.parameters / plan.dense.parameters
        factorized = sum(site.spec is not None for site in plan.sites)
        summary = f"{factorized} weights factorized, {100 * kept:.2f} % of the parameters kept"
        return analysed.to(Planned, plan=plan, summary=summary)

    def _demand_of(self, analysed: Analysed) -> Demand:
        """That in which the budget is met best: of files at the θ where least is lost."""
        assert self.budget is not None
        if self.budget.file is None:
            return self.demand(analysed)
        worth = {} if analysed.predictor is None else analysed.predictor.worth
        made: dict[float, Demand] = {}

        def chosen_at(theta: float) -> Chosen | None:
            made[theta] = self.demand(analysed, Filed(theta, worth.get(BITS, 1.0)))
            return made[theta].choose(replace(self.budget.of_bytes, loss=None))

        limit = self.budget.limits(dense_totals(analysed))["file"]
        first = first_theta(analysed.spectra, analysed.sizes, limit)
        theta, _ = least_lost_in_file(chosen_at, first)
        if theta not in made:
            chosen_at(theta)
        return made[theta]

    def demand(self, analysed: Analysed, filed: Filed | None = None) -> Demand:
        """What budgets can be asked of; it knows nothing of this one."""
        sizes, machine = self.batch_sizes, analysed.machine
        points = [self._points(analysed, last_resort=False, filed=filed)]
        if any(site.last_resort and site.blocked is None for site in analysed.sites):
            points.append(self._points(analysed, last_resort=True, filed=filed))
        made = [with_excess(each, sizes, machine) for each in points]
        tiers, negligible = [each for each, _ in made], made[0][1]
        fast = without_slow_points(tiers[0], negligible)
        overhead = np.append(other_costs(analysed, sizes), np.zeros(len(sizes)))
        times = [f"{kind}[{k}]" for kind in ("latency", SLOWER) for k in range(len(sizes))]
        return Demand(
            self._predicting(analysed),
            (*([] if fast is None else [fast]), *tiers),
            int(fast is not None),
            len(tiers) > 1,
            (*COSTS, *times),
            overhead,
            negligible,
            dense_totals(analysed, sizes),
            self.refine,
            self.even,
            COSTS.index("bytes" if integers(self.precision) else "params"),
        )

    def _predicting(self, analysed: Analysed) -> Analysed:
        """The same, which knows what sums of distortions cost in plans made as this one."""
        found = analysed.predictor
        if found is None or not integers(self.precision):
            return analysed
        return replace(analysed, predictor=found.with_bits)

    # ---------------------------------------------------------------------------- the points

    def _allowed(self, curve: Spectrum) -> tuple[str, ...]:
        """The formats that a weight may take."""
        return curve.formats if self.formats is None else self.formats[curve.site.name]

    def _points(
        self, analysed: Analysed, *, last_resort: bool, filed: Filed | None = None
    ) -> list[Points]:
        unable = {
            name: f"of formats={'/'.join(self._allowed(curve))} it can take none at a rank"
            for name, curve in analysed.spectra.items()
            if not takes_ranks(curve, self._allowed(curve))
        }
        overrides = _overrides(analysed.sites, self.ranks, unable)
        load, scale = (self.batch_sizes, analysed.machine), scales(analysed)
        pivots = self.always or (self.pivots and analysed.machine.reads_orders)
        bits = integers(self.precision)
        # A pack takes more than all else of a weight: where memory is limited there is none.
        packs = self.budget is None or self.budget.bytes is None
        inputs = Inputs(self.activations, packs)
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
            allowed = self._allowed(curve)
            if forced is not None:
                if not takes_own(self.precision, site.dtype):
                    raise AnalysisError(
                        f"ranks= gives weights of their own dtype, and precision= has no "
                        f"{site.dtype}",
                        site=site.name,
                        way_out='ranks= without precision=, or precision="auto"',
                    )
                result.append(
                    forced_point(
                        *(curve, forced, itemsize, load[0], allowed, load[1]),
                        pivots=pivots,
                        filed=filed,
                    )
                )
            elif site.last_resort and not last_resort:
                result.append(dense_point(site, itemsize, site.last_resort, *load))
            elif self.budget is None:
                why = "not named by ranks="
                if site.name in unable and any(matches(site, each) for each in self.ranks or {}):
                    why = unable[site.name]
                result.append(dense_point(site, itemsize, why, *load))
            else:
                given = curve, allowed, itemsize, load[0], self.rank_multiple, load[1]
                how: dict[str, Any] = {"pivots": pivots, "always": self.always}
                how |= {"own": takes_own(self.precision, site.dtype), "precisions": bits}
                how |= {"inputs": inputs, "filed": filed}
                how |= {"worth": analysed.predictor and analysed.predictor.worth}
                result.append(curve_points(*given, scale[site.name], **how))
        names = {
            site.name
            for site in analysed.sites
            if takes_own(self.precision, site.dtype)
            and (self.formats is None or joins(self.formats.get(site.name, ())))
        }
        if self.even:
            return together(result)
        given = names, scale, self.rank_multiple, self.batch_sizes, pivots, filed
        return _grouped(result, analysed, *given)

    # ------------------------------------------------------------------------------ the plan

    def _plan(self, analysed: Analysed, found: Chosen) -> Plan:
        points, choice = found.points, found.choice
        used = other_costs(analysed, self.batch_sizes)
        used = used + sum(p.costs[k][: len(used)] for p, k in zip(points, choice, strict=True))
        chosen = {s.name: s for p, k in zip(points, choice, strict=True) for s in p.plans(k)}
        slow = slow_choices(
            analysed.sites, list(chosen.values()), self.batch_sizes, analysed.machine
        )
        for name, those in slow.items():
            batches = ", ".join(f"{each.batch:,}" for each in those)
            rows = "row" if [each.batch for each in those] == [1] else "rows"
            reason = f"{chosen[name].reason}; slower than dense at {batches} {rows}"
            chosen[name] = replace(chosen[name], reason=reason)
        sites = tuple(chosen[site.name] for site in analysed.sites)
        loss, interval, metrics = None, None, ()
        error = max((site.predicted_error for site in sites), default=0.0)
        if analysed.predictor is not None:
            loss, interval = analysed.predictor.predict(found.lost - found.coded, self.refine)
            error = analysed.predictor.output_error(loss)
            metrics = analysed.predictor.predict_metrics(loss, interval)
        dense, notes = dense_totals(analysed, self.batch_sizes), (*analysed.notes, *self.notes)
        file = None if self.budget is None else self.budget.limits(dense).get("file")
        if file is not None and analysed.predictor is not None:
            in_file, _ = analysed.predictor.predict(found.lost, self.refine)
            notes += (f"a file of {file:,.0f} bytes is expected to lose {in_file:.3g}, with codes",)
        predicted = Prediction(
            parameters=int(used[0]),
            bytes=int(used[1]),
            flops=int(used[2]),
            output_error=error,
            loss=loss,
            loss_interval=interval,
            latency=tuple(float(t) for t in used[len(COSTS) :]),
            communication=int(used[3]),
            metrics=metrics,
            file=None if file is None else int(file),
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
            gap=found.gap,
            machine=analysed.machine.name,
            notes=notes,
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


def _overrides(
    sites: Sequence[Site], ranks: RanksOption, unable: Mapping[str, str]
) -> dict[str, int | str]:
    """The ranks that are asked for. A pattern leaves out weights that stay dense or are unable."""
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
        able = [site for site in free if site.name not in unable]
        if not able or (exact and len(able) < len(free)):
            first = next(site.name for site in free if site.name in unable)
            raise AnalysisError(
                f"ranks[{pattern!r}] cannot be met: {unable[first]}",
                site=first,
                way_out="formats='low_rank', which all weights can take, or leave it out of ranks=",
            )
        for site in able:
            chosen.setdefault(site.name, rank)
    return chosen


def _grouped(
    points: Sequence[Points],
    analysed: Analysed,
    allowed: Collection[str],
    scale: Mapping[str, float],
    rank_multiple: int,
    batch_sizes: Sequence[int],
    pivots: bool,
    filed: Filed | None,
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
        group = (
            group_points(members, curves, *load, pivots=pivots, filed=filed)
            if len(members) > 1
            else None
        )
        if group is not None:
            for p in members:
                del result[p.site.name]
            result[group.site.name] = group
    return list(result.values())
