"""Candidates of weights that share their first factor: one choice for several weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate.candidates import BYTES, COSTS, FILE, Points
from tensorize.passes.allocate.flops import element_size
from tensorize.passes.allocate.forms import Forms, in_file, labelled, labels, rounding_lost
from tensorize.passes.allocate.optimise import lower_hull
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.filed import Filed


@dataclass(frozen=True)
class GroupPoints(Points):
    """The points of weights of one input, together: each by itself, or with one first factor.

    ``labels``: k ≥ 0 is row k of ``picks``, the members' own points; below 0 a first factor in
    common, of a rank in one of its ``forms``. ``site`` is the first member's.
    """

    members: tuple[Points, ...] = ()
    curves: tuple[Spectrum, ...] = ()
    picks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), int))

    @property
    def in_bits(self) -> np.ndarray:
        each = [p.in_bits[self.picks[:, i]] for i, p in enumerate(self.members)]
        own = np.logical_or.reduce(each)
        return np.array([label >= 0 and own[label] for label in self.labels])

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(curve.site for curve in self.curves)

    def plans(self, k: int) -> tuple[RankPlan, ...]:
        label = int(self.labels[k])
        if label >= 0:
            own = zip(self.members, self.picks[label].tolist(), strict=True)
            return tuple(plan for member, pick in own for plan in member.plans(pick))
        rank, pivoted, *_ = labelled(-label)
        plans = []
        names = ", ".join(curve.site.name for curve in self.curves)
        for curve in self.curves:
            assert curve.shared is not None
            lost = float(curve.shared.distortion[rank]) + rounding_lost(curve, pivoted)
            plans.append(
                RankPlan(
                    name=curve.site.name,
                    kind=curve.site.kind,
                    shape=curve.site.shape,
                    spec=TTSpec.low_rank(*curve.site.matrix, rank, pivoted=pivoted),
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
    *,
    pivots: bool = False,
    filed: Filed | None = None,
) -> GroupPoints | None:
    """One choice for weights of one input; None where a first factor in common gains nothing.

    ``pivots``: that factor need not store what a change of basis can remove.

    Of the members' own points those on their lower convex hulls are kept, in the order in which a
    growing budget would take them.
    """
    # With bits a budget is one of bytes.
    size = BYTES if any(p.in_bits.any() for p in members) else COSTS.index("params")
    size = size if filed is None else FILE
    picks = _along_hulls(members, size)
    columns = range(len(members))

    def total(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.sum([arrays[i][picks[:, i]] for i in columns], axis=0)

    costs, objective = total([p.costs for p in members]), total([p.objective for p in members])
    lost = total([p.distortion for p in members])
    errors = np.max([members[i].errors[picks[:, i]] for i in columns], axis=0)
    codes = total([np.zeros(len(p.labels)) if p.coded is None else p.coded for p in members])
    shared = [curve.shared.distortion.numpy() for curve in curves if curve.shared is not None]
    ranks = np.arange(1, min(map(len, shared)))
    ranks = ranks[(ranks % rank_multiple == 0) | (ranks < rank_multiple)]
    sites = tuple(curve.site for curve in curves)
    forms = Forms(sites, element_size(sites[0]), batch_sizes, machine)
    order = np.argsort(costs[:, size], kind="stable")
    rows: list[tuple[np.ndarray, ...]] = [
        (costs, lost, objective, errors, codes, np.arange(len(picks)))
    ]
    for pivoted, those in forms.worthwhile(ranks, pivots=pivots).items():
        own = forms.costs(those, pivoted)
        pairs = zip(shared, curves, strict=True)
        tails = [tail[those] + rounding_lost(curve, pivoted) for tail, curve in pairs]
        rises = [curve.rise(tail) for tail, curve in zip(tails, curves, strict=True)]
        weighed = np.sum([r * each for r, each in zip(rises, scale, strict=True)], axis=0)
        nats = np.sum([r * curve.in_nats for r, curve in zip(rises, curves, strict=True)], axis=0)
        off = [curve.errors(tail) for tail, curve in zip(tails, curves, strict=True)]
        kinds = labels(those, pivoted)
        coded = np.zeros(len(those))
        if filed is not None:
            own[:, FILE], coded = in_file(filed, curves, shared, kinds, own[:, BYTES])
            # Members are of one unit, and count alike.
            weighed, nats = weighed + coded * scale[0], nats + coded * curves[0].in_nats
            coded = coded * curves[0].in_nats
        better = weighed < np.interp(
            own[:, size], costs[order, size], objective[order], left=np.inf
        )
        found = own, nats, weighed, np.max(off, axis=0), coded, -kinds
        rows.append(tuple(each[better] for each in found))
    if not any(len(objective) for _, _, objective, *_ in rows[1:]):
        return None
    costs, lost, objective, errors, codes, kinds = (
        np.concatenate(each) for each in zip(*rows, strict=True)
    )
    return GroupPoints(
        site=sites[0],
        costs=costs,
        distortion=lost,
        objective=objective,
        errors=errors,
        labels=kinds,
        coded=None if filed is None else codes,
        members=tuple(members),
        curves=tuple(curves),
        picks=picks,
    )


def _along_hulls(members: Sequence[Points], size: int) -> np.ndarray:
    """Rows of one point a member, from all at their smallest to all at their best."""
    hulls = [lower_hull(p.costs[:, size], p.objective) for p in members]
    steps: list[tuple[float, int, int]] = []
    for i, (p, hull) in enumerate(zip(members, hulls, strict=True)):
        rates = np.diff(p.objective[hull]) / np.diff(p.costs[hull, size])
        steps += zip(rates.tolist(), [i] * len(rates), hull[1:].tolist(), strict=True)
    current = [int(hull[0]) for hull in hulls]
    rows = [list(current)]
    for _, i, k in sorted(steps, key=lambda step: step[0]):
        current[i] = k
        rows.append(list(current))
    return np.array(rows)
