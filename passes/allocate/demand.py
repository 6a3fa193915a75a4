"""What budgets are asked of: the points of all weights, and what else the model costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Totals
from tensorize.passes.allocate.alike import with_the_rest_spent
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.choose import Chosen, Tiers
from tensorize.passes.stages import Analysed

# Times are sums of many roundings, in this order or in that.
_ROUNDING = 1e-9

SLOWER = "slower"


@dataclass(frozen=True)
class Demand:
    """The points of every weight, by tiers: of what is fastest first.

    ``fast``: how many of the tiers are there for speed alone, and of no use to a limit on times;
    ``rebuilt``: whether the last one may rebuild weights of last resort.
    ``size`` is the cost (a column) that is least where a budget limits none.
    ``names`` are those of the costs, the last of them by how much weights are slower than dense;
    ``negligible`` is what does not count of these. ``overhead`` is what everything else costs.
    """

    analysed: Analysed
    tiers: tuple[Sequence[Points], ...]
    fast: int
    rebuilt: bool
    names: tuple[str, ...]
    overhead: np.ndarray
    negligible: np.ndarray
    dense: Totals
    refine: str | None
    even: bool = False
    size: int = 0
    _known: dict[object, Tiers] = field(default_factory=dict)

    def choose(self, budget: Budget) -> Chosen | None:
        """The choice for a budget; None where none meets it."""
        if not self.tiers_within(budget.error):
            return None
        tiers = self.choices(budget)
        if not self.limits(budget):
            return tiers.smallest(self._most_lost(budget))
        chosen = tiers.least_lost(self.caps(budget))
        if chosen is None or chosen.lost > self._most_lost(budget):
            return None
        return with_the_rest_spent(chosen, self.caps(budget)) if self.even else chosen

    def limits(self, budget: Budget) -> dict[str, float]:
        return budget.limits(self.dense)

    def caps(self, budget: Budget) -> np.ndarray:
        """What weights may cost, by column; infinity where nothing is limited."""
        limits = self.limits(budget)
        caps = np.array([limits.get(name, np.inf) for name in self.names]) - self.overhead
        times = slice(len(COSTS), len(self.names))
        caps[times] = caps[times] * (1 - _ROUNDING)
        return caps

    def choices(self, budget: Budget) -> Tiers:
        """The choices among which a budget finds its own."""
        limited = tuple(np.flatnonzero(np.isfinite(self.caps(budget))).tolist()) or (self.size,)
        key = limited, budget.error, budget.latency is None
        if key not in self._known:
            tiers = self.tiers_within(budget.error, fast=budget.latency is None)
            error = np.inf if budget.error is None else budget.error
            last = [_within(p, error) for p in self.tiers[-1]]
            rebuilt = self.rebuilt and _is_whole(last)
            slow = {
                len(self.names) - len(self.negligible) + k: float(most)
                for k, most in enumerate(self.negligible)
            }
            self._known[key] = Tiers.of(tiers, limited, slow, rebuilt=rebuilt, even=self.even)
        return self._known[key]

    def tiers_within(self, error: float | None, *, fast: bool = True) -> list[Sequence[Points]]:
        """The tiers that have points for every weight within an error, and these points."""
        tiers = list(self.tiers if fast else self.tiers[self.fast :])
        if error is None:
            return tiers
        within = [[_within(p, error) for p in tier] for tier in tiers]
        return [tier for tier in within if _is_whole(tier)]

    def predicted(self, lost: float) -> float:
        """The rise of the loss that goes with a sum of distortions."""
        assert self.analysed.predictor is not None
        return self.analysed.predictor.predict(lost, self.refine)[0]

    def _most_lost(self, budget: Budget) -> float:
        """The largest sum of distortions whose predicted loss is within the budget."""
        if budget.loss is None:
            return np.inf
        if self.analysed.predictor is None:
            raise BudgetError(
                "a limit on the loss needs to know the loss",
                way_out="pass calibration data (and no metric= but 'loss')",
            )
        return self.analysed.predictor.inverse(budget.loss, self.refine)

    def least(self, budget: Budget, raised: Collection[str]) -> Budget | None:
        """A budget that can be met: some of its costs are raised, the other limits stay.

        None where the other limits cannot be met. Of several costs, what exceeds its limit most is
        as near to it as can be.
        """
        caps, tiers = self.caps(budget), self.choices(budget)
        costs = [name.partition("[")[0] for name in self.names]
        ours = np.array([cost in raised for cost in costs]) & np.isfinite(caps)
        others, limits = np.where(ours, np.inf, caps), (caps + self.overhead)[ours]
        best: tuple[float, np.ndarray] | None = None
        for each in (one for tier in tiers.choices for one in tier):
            inside = each.within(others)
            if len(inside):
                total = each.costs[inside] + self.overhead
                excess = (total[:, ours] / np.maximum(limits, 1e-300)).max(1)
                k = int(np.argmin(excess))
                if best is None or excess[k] < best[0]:
                    best = float(excess[k]), total[k]
        if best is None:
            return None
        exceeded = {
            costs[j] for j in np.flatnonzero(ours) if best[1][j] > caps[j] + self.overhead[j]
        }
        dense = self.dense.costs
        needed: dict[str, Any] = {}
        for name in exceeded:
            columns = [j for j, cost in enumerate(costs) if cost == name]
            totals = [(float(best[1][j]), dense[j]) for j in columns]
            exact = name != "latency"
            more = 1.0 if exact else 1 + 2 * _ROUNDING
            needed[name] = math.ceil(max(total for total, _ in totals) * more)
            if not exact and isinstance(budget.latency, float):
                # Of several numbers of rows each has its own limit, where it is a share.
                share = max(total / max(of, 1e-300) for total, of in totals) * more
                if share <= 1:
                    needed[name] = min(1.0, math.ceil(share * 1e4) / 1e4)
        return replace(budget, **needed)


def _is_whole(tier: Sequence[Points]) -> bool:
    """Whether there are points for every weight."""
    return all(len(p.labels) for p in tier)


def _within(points: Points, error: float) -> Points:
    """The points of a weight whose relative error is within a limit, once rounded."""
    return points.only(np.flatnonzero(rounded_errors(points) <= error))


def rounded_errors(points: Points) -> np.ndarray:
    """The relative errors of factors in their own dtype; a dense weight has none.

    Rounding every entry of two factors changes their product by some .2 eps of its size, measured
    on trained weights (the entries' errors are independent of each other and of the truncation).
    """
    if not points.errors.any():
        return points.errors  # dense, and perhaps of a dtype that rounds nothing
    eps = torch.finfo(getattr(torch, points.site.dtype)).eps
    return np.where(points.errors > 0, np.hypot(points.errors, eps / 2), 0.0)
