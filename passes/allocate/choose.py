"""The choice for a budget, of those that are the same for every budget.

What is slower than dense is left out where that costs next to nothing. Which choices are so left
out does not depend on the budget either: those to which a faster one is nearly as good and costs no
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tensorize.passes.allocate.candidates import Points
from tensorize.passes.allocate.optimise import Choices, choices_of

WORTH = 1.05
"""By what factor the distortion may grow so that no weight is slower than dense."""

REBUILT = 10.0
"""By what factor it may grow so that no weight is rebuilt at every call."""

_LEVELS = 2
"""How often it is looked between two choices, and between two of those."""

_STRIDES = (4, 2, 1)
"""How far the θ of a file is moved in a search, in half octaves."""

_COARSEST = 80
"""How far beyond the first it is looked for."""


@dataclass(frozen=True)
class Chosen:
    """One point of every weight; ``gap`` is by what share a better choice might be better."""

    points: Sequence[Points]
    choice: list[int]
    gap: float

    @property
    def lost(self) -> float:
        """The sum of distortions."""
        return sum(float(p.distortion[k]) for p, k in self._pairs)

    @property
    def coded(self) -> float:
        """What of that is by codes in a file."""
        return sum(p.coded_at(k) for p, k in self._pairs)

    @property
    def objective(self) -> float:
        return sum(float(p.objective[k]) for p, k in self._pairs)

    @property
    def _pairs(self) -> Iterator[tuple[Points, int]]:
        return zip(self.points, self.choice, strict=True)


@dataclass(frozen=True)
class Tiers:
    """The choices of a model: of what is fastest first; each tier may do what those before do.

    ``limited`` are the costs (columns) that a budget may limit; ``slow`` those that tell of what is
    slower than dense, and how much of each does not count. ``rebuilt``: the last tier is of
    choices that rebuild weights of last resort. ``even``: none between those of the paths.
    """

    points: tuple[Sequence[Points], ...]
    choices: tuple[tuple[Choices, ...], ...]
    limited: tuple[int, ...]
    slow: Mapping[int, float]
    rebuilt: bool = False
    even: bool = False

    @classmethod
    def of(
        cls,
        points: Sequence[Sequence[Points]],
        limited: Sequence[int],
        slow: Mapping[int, float] | None = None,
        *,
        rebuilt: bool = False,
        even: bool = False,
    ) -> Tiers:
        choices = tuple(choices_of(each, limited, even=even) for each in points)
        return cls(tuple(points), choices, tuple(limited), slow or {}, rebuilt, even)

    def _rebuilds(self, tier: int) -> bool:
        return self.rebuilt and tier == len(self.choices) - 1

    def _is_slow(self, one: Choices, rows: np.ndarray) -> np.ndarray:
        slow = [one.costs[rows, column] > most for column, most in self.slow.items()]
        return np.logical_or.reduce(slow) if slow else np.ones(len(rows), dtype=bool)

    def least_lost(self, caps: np.ndarray) -> Chosen | None:
        """What loses least within the caps; None where nothing fits."""
        columns = list(self.limited)

        def given_up(one: Choices, rows: np.ndarray, faster: Choices, rebuilds: bool) -> np.ndarray:
            costs = {column: one.costs[rows, column] for column in columns}
            return faster.cover((REBUILT if rebuilds else WORTH) * one.objective[rows], costs)

        return self._first(
            lambda one: one.within(caps),
            lambda one: (one.lost, one.objective, one.costs[:, columns[0]]),
            given_up,
            lambda one, k: one.after(k),
            lambda one: one.objective,
            lambda one: one.least_objective(caps),
        )

    def smallest(self, lost: float) -> Chosen | None:
        """The least of the first limited cost that loses no more; None where all lose more."""
        limited, size = np.isfinite(lost), self.limited[0]

        def given_up(one: Choices, rows: np.ndarray, faster: Choices, rebuilds: bool) -> np.ndarray:
            most = one.objective[rows] if limited else np.full(len(rows), np.inf)
            worth = np.inf if rebuilds else WORTH
            return faster.cover(most, {size: worth * one.costs[rows, size]})

        return self._first(
            lambda one: np.flatnonzero(one.lost <= lost),
            lambda one: (one.costs[:, size], one.lost, one.objective),
            given_up,
            lambda one, k: one.after(k - 1),
            lambda one: one.costs[:, size],
            lambda one: one.least_cost(lost, size),
        )

    def _first(
        self,
        allowed: Callable[[Choices], np.ndarray],
        key: Callable[[Choices], tuple[np.ndarray, ...]],
        given_up: Callable[[Choices, np.ndarray, Choices, bool], np.ndarray],
        beside: Callable[[Choices, int], Choices | None],
        figure: Callable[[Choices], np.ndarray],
        bound: Callable[[Choices], float],
    ) -> Chosen | None:
        """The allowed choice of least key, those beside it included, that is not given up.

        ``figure`` is what is minimised, ``bound`` what no choice at all is below in it.
        """
        best: tuple[tuple[float, ...], int, Choices, int] | None = None

        def consider(tier: int, one: Choices, k: int) -> None:
            nonlocal best
            mine = tuple(float(part[k]) for part in key(one))
            if best is None or mine < best[0]:
                best = mine, tier, one, k

        for tier, parts in enumerate(self.choices):
            for one in parts:
                rows = allowed(one)
                rows = rows[np.lexsort([part[rows] for part in key(one)][::-1])]
                gone = np.zeros(len(rows), dtype=bool)
                for faster in (each for parts in self.choices[:tier] for each in parts):
                    gone |= given_up(one, rows, faster, self._rebuilds(tier))
                if not self._rebuilds(tier):
                    gone &= self._is_slow(one, rows)
                if gone.all():
                    continue
                k = int(rows[np.argmin(gone)])
                consider(tier, one, k)
                for _ in range(0 if self.even else _LEVELS):
                    others = beside(one, k)
                    if others is None or len(others.lost) < 2:
                        break
                    one, rows = others, allowed(others)
                    k = len(others.lost)
                    if len(rows):
                        k = int(rows[np.lexsort([part[rows] for part in key(one)][::-1])[0]])
                        consider(tier, one, k)
        if best is None:
            return None
        _, tier, one, k = best
        every = self.choices[-1 if self._rebuilds(tier) or not self.rebuilt else -2]
        mine = float(figure(one)[k])
        least = min(mine, max(map(bound, every)))
        return Chosen(self.points[tier], one.pick(k), 1 - least / mine if mine > 0 else 0.0)


def least_lost_in_file(
    chosen_at: Callable[[float], Chosen | None], first: float
) -> tuple[float, Chosen | None]:
    """The θ of a file, and the choice at it, that lose least of all; None: none fits at any θ.

    Begun at the ``first``, with strides that become shorter.
    """
    known: dict[int, Chosen | None] = {}

    def at(k: int) -> Chosen | None:
        if k not in known:
            known[k] = chosen_at(first * 2 ** (k / 2))
        return known[k]

    def lost(k: int) -> float:
        found = at(k)
        return math.inf if found is None else found.objective

    best = next((k for k in range(0, _COARSEST, _STRIDES[0]) if at(k) is not None), None)
    if best is None:
        return first * 2.0 ** (_COARSEST / 2), None
    for stride in _STRIDES:
        while lost(beside := min(best - stride, best + stride, key=lost)) < lost(best):
            best = beside
    return first * 2 ** (best / 2), at(best)
