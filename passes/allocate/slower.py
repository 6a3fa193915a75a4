"""Weights that are slower as factors than dense, at the batches stated.

Two matmuls in place of one cost a call more, and ranks near where nothing is saved cost time as
well. The allocation leaves such points out wherever the predicted loss stays near what it is with
them (``choose.py``); where the budget forces them, the plan says so, and the report how slow they
are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.ir.machine import Machine
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.times import dense_times, first_times, spec_times

# What all weights together lose by being slower is not worth a parameter below this share of the
# whole model's time.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Slower:
    """Microseconds of a factorized weight for so many rows, and of the dense one."""

    batch: int
    factorized: float
    dense: float


def allowances(excess: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """For each batch the most that one weight may be slower by without counting as slow.

    So that those which do not count are together slower by at most ``_NEGLIGIBLE`` of the whole
    model's time: where many are a little slower, all of them count.

    Args:
        excess: microseconds (weights, batches) by which weights are slower than dense.
        whole: microseconds (batches) of the whole dense model.
    """
    found = np.zeros(len(whole))
    for k, column in enumerate(np.sort(excess.clip(min=0), axis=0).T):
        # Weights that are alike count, or do not, together.
        up_to = np.cumsum(column)[np.searchsorted(column, column, side="right") - 1]
        within = column[up_to <= _NEGLIGIBLE * whole[k]]
        found[k] = within[-1] if len(within) else 0.0
    return found


def with_excess(
    points: Sequence[Points], batch_sizes: Sequence[int], machine: Machine
) -> tuple[list[Points], np.ndarray]:
    """Points with one more cost for each batch: by how much they are slower than dense.

    Also what is negligible of that in a whole model.
    """
    found, whole = [], np.zeros(len(batch_sizes))
    for p in points:
        dense = np.sum([dense_times(site, batch_sizes, machine) for site in p.sites], axis=0)
        excess = (p.costs[:, len(COSTS) :] - dense).clip(min=0)
        found.append(replace(p, costs=np.hstack([p.costs, excess])))
        whole += dense
    return found, _NEGLIGIBLE * whole


def without_slow_points(points: Sequence[Points], negligible: np.ndarray) -> list[Points] | None:
    """Points that are not slower than dense, for every weight; None where all points are such.

    Each may be slower by its part of what is negligible; points are ``with_excess``.
    """
    free = sum(p.fixed is None for p in points)
    found = []
    for p in points:
        fast = (p.costs[:, -len(negligible) :] <= negligible / max(free, 1)).all(-1)
        # A weight of which every point is slow (its rank is forced, say) keeps them all.
        useful = p.fixed is None and fast.any() and not fast.all()
        found.append(p.only(np.flatnonzero(fast)) if useful else p)
    return found if any(a is not b for a, b in zip(found, points, strict=True)) else None


def slow_choices(
    sites: Sequence[Site],
    choices: Sequence[RankPlan],
    batch_sizes: Sequence[int],
    machine: Machine,
) -> dict[str, tuple[Slower, ...]]:
    """The factorized weights of a plan that are predicted to be slower than dense, by name."""
    if not sites:
        return {}
    dense = np.stack([dense_times(site, batch_sizes, machine) for site in sites])
    times = np.stack(_times(sites, choices, batch_sizes, machine, dense))
    slow = times - dense > allowances(times - dense, dense.sum(0))
    return {
        site.name: tuple(
            Slower(batch_sizes[k], float(times[row, k]), float(dense[row, k]))
            for k in np.flatnonzero(slow[row]).tolist()
        )
        for row, site in enumerate(sites)
        if slow[row].any()
    }


def _times(
    sites: Sequence[Site],
    choices: Sequence[RankPlan],
    batch_sizes: Sequence[int],
    machine: Machine,
    dense: np.ndarray,
) -> list[np.ndarray]:
    """What each weight takes in a plan; weights with one first factor share its product."""
    chosen = {choice.name: choice for choice in choices}
    readers = Counter(choice.shared for choice in choices if choice.shared is not None)
    found = []
    for site, own in zip(sites, dense, strict=True):
        choice = chosen[site.name]
        if choice.spec is None:
            found.append(own)
            continue
        took = spec_times(site, choice.spec, batch_sizes, machine)
        if choice.shared is not None:
            saved = 1 - 1 / readers[choice.shared]
            took = took - saved * first_times(site, choice.spec, batch_sizes, machine)
        found.append(took)
    return found
