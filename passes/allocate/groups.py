"""Candidates of weights that share their first factor: one choice for several weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tensorize.ir.machine import GENERIC, Machine, matmul_time
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate.candidates import Points
from tensorize.passes.allocate.flops import element_size
from tensorize.passes.allocate.optimise import lower_hull
from tensorize.passes.curves.curve import Spectrum


@dataclass(frozen=True)
class GroupPoints(Points):
    """The points of weights of one input, together: each by itself, or with one first factor.

    ``labels``: k ≥ 0 is row k of ``picks``, the members' own points; -r a first factor of rank r
    in common. ``site`` is the first member's.
    """

    members: tuple[Points, ...] = ()
    curves: tuple[Spectrum, ...] = ()
    picks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), int))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(curve.site for curve in self.curves)

    def plans(self, k: int) -> tuple[RankPlan, ...]:
        rank = -int(self.labels[k])
        if rank <= 0:
            own = zip(self.members, self.picks[-rank].tolist(), strict=True)
            return tuple(plan for member, pick in own for plan in member.plans(pick))
        plans = []
        names = ", ".join(curve.site.name for curve in self.curves)
        for curve in self.curves:
            assert curve.shared is not None
            lost = float(curve.shared.distortion[rank])
            plans.append(
                RankPlan(
                    name=curve.site.name,
                    kind=curve.site.kind,
                    shape=curve.site.shape,
                    spec=TTSpec.low_rank(*curve.site.matrix, rank),
                    predicted_error=curve.error(lost),
                    predicted_loss=float(curve.rise(np.array(lost))) if curve.in_nats else 0.0,
                    reason=f"rank chosen by the budget, one first factor for {names}",
                    shared=self.site.name,
                )
            )
        return tuple(plans)


def group_points(
    members: Sequence[Points],
    curves: Sequence[Spectrum],
    scale: Sequence[float],
    rank_multiple: int = 1,
    batch_sizes: Sequence[int] = (),
    machine: Machine = GENERIC,
) -> GroupPoints | None:
    """One choice for weights of one input; None where a first factor in common gains nothing.

    Of the members' own points those on their lower convex hulls are kept, in the order in which a
    growing budget would take them.
    """
    picks = _along_hulls(members)
    columns = range(len(members))

    def total(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.sum([arrays[i][picks[:, i]] for i in columns], axis=0)

    costs, objective = total([p.costs for p in members]), total([p.objective for p in members])
    lost = total([p.distortion for p in members])
    errors = np.max([members[i].errors[picks[:, i]] for i in columns], axis=0)
    shared = [curve.shared for curve in curves]
    rows, n = sum(curve.site.matrix[0] for curve in curves), curves[0].site.matrix[1]
    ranks = np.arange(1, min(len(s.distortion) for s in shared if s is not None))
    ranks = ranks[(ranks % rank_multiple == 0) | (ranks < rank_multiple)]
    tails = [s.distortion.numpy()[ranks] for s in shared if s is not None]
    itemsize = element_size(curves[0].site)
    together = ranks * (rows + n)
    rises = [curve.rise(tail) for tail, curve in zip(tails, curves, strict=True)]
    weighed = np.sum([r * each for r, each in zip(rises, scale, strict=True)], axis=0)
    order = np.argsort(costs[:, 0], kind="stable")
    better = weighed < np.interp(together, costs[order, 0], objective[order], left=np.inf)
    if not better.any():
        return None
    ranks, together, weighed = ranks[better], together[better], weighed[better]
    tails = [tail[better] for tail in tails]
    in_nats = [rise[better] * curve.in_nats for rise, curve in zip(rises, curves, strict=True)]
    off = [curve.errors(tail) for tail, curve in zip(tails, curves, strict=True)]
    # The product with the input is computed once.
    dtype = curves[0].site.dtype
    times = [matmul_time(machine, batch, n, ranks, dtype) for batch in batch_sizes]
    for curve in curves:
        for k, batch in enumerate(batch_sizes):
            times[k] = times[k] + matmul_time(machine, batch, ranks, curve.site.matrix[0], dtype)
    own = np.stack([together, together * itemsize, 2 * together, *times], axis=1)
    return GroupPoints(
        site=curves[0].site,
        costs=np.concatenate([costs, own]),
        distortion=np.concatenate([lost, np.sum(in_nats, axis=0)]),
        objective=np.concatenate([objective, weighed]),
        errors=np.concatenate([errors, np.max(off, axis=0)]),
        labels=np.concatenate([np.arange(len(picks)), -ranks]),
        members=tuple(members),
        curves=tuple(curves),
        picks=picks,
    )


def _along_hulls(members: Sequence[Points]) -> np.ndarray:
    """Rows of one point a member, from all at their smallest to all at their best."""
    hulls = [lower_hull(p.costs[:, 0], p.objective) for p in members]
    steps: list[tuple[float, int, int]] = []
    for i, (p, hull) in enumerate(zip(members, hulls, strict=True)):
        rates = np.diff(p.objective[hull]) / np.diff(p.costs[hull, 0])
        steps += zip(rates.tolist(), [i] * len(rates), hull[1:].tolist(), strict=True)
    current = [int(hull[0]) for hull in hulls]
    rows = [list(current)]
    for _, i, k in sorted(steps, key=lambda step: step[0]):
        current[i] = k
        rows.append(list(current))
    return np.array(rows)
