"""Weights that are slower as factors than dense, at the batches stated.

Two matmuls in place of one cost a call more, and ranks near where nothing is saved cost time as
well. The allocation leaves such points out wherever the predicted loss stays near what it is with
them; where the budget forces them, the plan says so, and the report how slow they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensorize.ir import Machine, RankPlan, Site, TTSpec
from tensorize.passes.cost import dense_times, spec_times
from tensorize.passes.points import COSTS, Points

WORTH = 1.05
"""By what factor the distortion may grow so that no weight is slower than dense."""

# What is slower by less than this share of the whole model's time is not worth a parameter.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Slower:
    """Microseconds of a factorized weight for so many rows, and of the dense one."""

    batch: int
    factorized: float
    dense: float


def is_slow(times: np.ndarray, dense: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Whether times (…, batch sizes) exceed the dense ones by what counts in the whole model."""
    return (times > dense + _NEGLIGIBLE * whole).any(-1)


def without_slow_points(
    points: Sequence[Points], batch_sizes: Sequence[int], machine: Machine
) -> list[Points] | None:
    """Points that are not slower than dense, for every weight; None where all are already so."""
    dense = [
        np.sum([dense_times(site, batch_sizes, machine) for site in p.sites], axis=0)
        for p in points
    ]
    whole = np.sum(dense, axis=0)
    found, dropped = [], False
    for p, own in zip(points, dense, strict=True):
        fast = ~is_slow(p.costs[:, len(COSTS) :], own, whole)
        # A weight of which every point is slow (its rank is forced, say) keeps them all.
        useful = p.fixed is None and fast.any() and not fast.all()
        found.append(p.only(np.flatnonzero(fast)) if useful else p)
        dropped = dropped or useful
    return found if dropped else None


def slower_than_dense(
    site: Site, spec: TTSpec, batch_sizes: Sequence[int], machine: Machine, whole: np.ndarray
) -> tuple[Slower, ...]:
    """At which of the batches factors are predicted to be slower, and by how much."""
    dense = dense_times(site, batch_sizes, machine)
    times = spec_times(site, spec, batch_sizes, machine)
    return tuple(
        Slower(batch, float(times[k]), float(dense[k]))
        for k, batch in enumerate(batch_sizes)
        if is_slow(times[k : k + 1], dense[k : k + 1], whole[k : k + 1])
    )


def slow_choices(
    sites: Sequence[Site],
    choices: Sequence[RankPlan],
    batch_sizes: Sequence[int],
    machine: Machine,
) -> dict[str, tuple[Slower, ...]]:
    """The factorized weights of a plan that are predicted to be slower than dense, by name."""
    if not sites:
        return {}
    whole = np.sum([dense_times(site, batch_sizes, machine) for site in sites], axis=0)
    specs = {choice.name: choice.spec for choice in choices if choice.shared is None}
    found = {
        site.name: slower_than_dense(site, spec, batch_sizes, machine, whole)
        for site in sites
        if (spec := specs.get(site.name)) is not None
    }
    return {name: slower for name, slower in found.items() if slower}
