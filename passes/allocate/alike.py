"""Weights of which nothing is known that would tell them apart: one choice for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.passes.allocate.candidates import Points
from tensorize.passes.allocate.choose import Chosen


@dataclass(frozen=True)
class AlikePoints(Points):
    """The points of several weights that all take the same."""

    alike: tuple[Site, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.alike

    def plans(self, k: int) -> tuple[RankPlan, ...]:
        (one,) = super().plans(k)
        lost = one.predicted_loss / len(self.alike)
        return tuple(
            replace(one, name=site.name, kind=site.kind, shape=site.shape, predicted_loss=lost)
            for site in self.alike
        )


def together(points: Sequence[Points]) -> list[Points]:
    """Weights with the same costs and the same losses at every point as one choice."""
    groups: dict[object, list[Points]] = defaultdict(list)
    for p in points:
        figures = p.costs.tobytes(), p.objective.tobytes(), p.others
        groups[p.site.matrix, p.site.experts, p.site.dtype, p.fixed, figures].append(p)
    return [_joined(members) if len(members) > 1 else members[0] for members in groups.values()]


def _joined(members: Sequence[Points]) -> AlikePoints:
    first, count = members[0], len(members)
    return AlikePoints(
        first.site,
        count * first.costs,
        count * first.distortion,
        count * first.objective,
        first.errors,
        first.labels,
        first.others,
        first.fixed,
        alike=tuple(site for p in members for site in p.sites),
    )


def with_the_rest_spent(chosen: Chosen, caps: np.ndarray) -> Chosen:
    """One step more for those weights for which there is room, the cheapest first."""
    steps = []
    for i, (p, k) in enumerate(zip(chosen.points, chosen.choice, strict=True)):
        larger = np.flatnonzero((p.costs[:, 0] > p.costs[k, 0]) & (p.objective < p.objective[k]))
        if len(larger) and p.spec(int(larger[0])) is not None:
            steps.append((float(p.costs[larger[0], 0] - p.costs[k, 0]), i, int(larger[0])))
    choice = list(chosen.choice)
    left = caps - sum(p.costs[k] for p, k in zip(chosen.points, choice, strict=True))
    for _, i, k in sorted(steps):
        extra = chosen.points[i].costs[k] - chosen.points[i].costs[choice[i]]
        if (extra <= left).all():
            choice[i], left = k, left - extra
    return replace(chosen, choice=choice)
