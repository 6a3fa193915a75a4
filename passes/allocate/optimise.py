"""The choices that plans are taken from: one point for every weight, the same for every budget.

A plan is the best of them that its budget allows, so that a larger budget never gets a worse one.

Where weights and points are few, these are all choices to which no other is better in every limited
cost and in what it loses: then the best is the optimum (Nemhauser & Ullmann 1969). Else they lie
along paths: for a price λ of a cost each weight takes the point of least objective + λ · cost, and
as the price falls, one weight after the other takes the next point of its lower convex hull
(Shoham & Gersho 1988). Each choice on the path is an optimum for its own cost, and between two of
them a straight line is a bound that no choice is below. Between two there are others that take
points above the hulls, in the same way. Several costs have paths for several mixtures of them.

The gaps of a path are as wide as the steps of its largest weight, which a table of words may be
half of: so there are paths, too, on which that weight stays at one of its points (a branch of
branch and bound, Land & Doig 1960).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tensorize.passes.allocate.candidates import Points

# The most pairs of a choice of some weights and a point of the next that are compared, for one
# limited cost and for several.
_PAIRS, _PAIRS_OF_SEVERAL = 100_000, 8_000

_LARGE, _LARGER = 0.02, 4.0
"""A step that leaves a gap which is worth paths of its own: its share of all costs, and how many
times it is as large as those of most weights."""

_MIXTURES = {1: (1,), 2: (0, 1, 4, 16), 3: (0, 1, 4)}
"""The shares of several costs that are tried in a mixture, by the number of costs."""


@dataclass(frozen=True)
class Choices:
    """Choices of one point a weight: costs (F, C), what they lose (F) and the objective (F).

    ``pick(k)`` gives the points of choice k.
    """

    costs: np.ndarray
    lost: np.ndarray
    objective: np.ndarray
    pick: Callable[[int], list[int]]

    def within(self, caps: np.ndarray) -> np.ndarray:
        """The numbers of those whose every cost is within its cap."""
        finite = np.flatnonzero(np.isfinite(caps))
        return np.flatnonzero((self.costs[:, finite] <= caps[finite]).all(1))

    def least_objective(self, caps: np.ndarray) -> float:
        """No choice at all has a smaller objective within the caps."""
        return float(self.objective[self.within(caps)].min(initial=np.inf))

    def least_cost(self, objective: float, column: int) -> float:
        """No choice at all has less of a cost and an objective within this."""
        return float(self.costs[self.objective <= objective, column].min(initial=np.inf))

    def after(self, k: int) -> Choices | None:
        """The choices between k and the next; None where there are none."""
        return None

    def cover(self, objective: np.ndarray, costs: Mapping[int, np.ndarray]) -> np.ndarray:
        """Which of several bounds, on the objective and on some costs, a choice is within."""
        if len(costs) == 1:
            ((column, most),) = costs.items()
            order = np.argsort(self.costs[:, column], kind="stable")
            least = np.append(np.inf, np.minimum.accumulate(self.objective[order]))
            inside = np.searchsorted(self.costs[order, column], most, side="right")
            return (inside > 0) & (least[inside] <= objective)
        found = np.zeros(len(objective), dtype=bool)
        for row in range(len(objective)):
            within = [self.costs[:, column] <= most[row] for column, most in costs.items()]
            found[row] = np.logical_and.reduce([self.objective <= objective[row], *within]).any()
        return found


@dataclass(frozen=True)
class Path(Choices):
    """Choices of which each is an optimum for its own cost, from the cheapest to the best.

    ``prices`` say what that cost is, a mixture of all; it stays below ``dearest``. ``rows`` are the
    points of each weight among which it is the best.
    """

    points: Sequence[Points]
    rows: Sequence[np.ndarray]
    prices: np.ndarray
    dearest: float = np.inf
    _between: dict[int, Path] = field(default_factory=dict)

    def least_objective(self, caps: np.ndarray) -> float:
        priced = self.prices > 0
        if not np.isfinite(caps[priced]).all():
            return 0.0
        at = float(self.prices[priced] @ caps[priced])
        return float(np.interp(at, self.costs @ self.prices, self.objective))

    def least_cost(self, objective: float, column: int) -> float:
        if np.flatnonzero(self.prices).tolist() != [column]:
            return 0.0
        return float(np.interp(-objective, -self.objective, self.costs[:, column]))

    def after(self, k: int) -> Choices | None:
        last = len(self.lost) - 1
        if not 0 <= k <= last or (k == last and not np.isfinite(self.dearest)):
            return None
        if k not in self._between:
            self._between[k] = self._made_between(k)
        return self._between[k]

    def cover(self, objective: np.ndarray, costs: Mapping[int, np.ndarray]) -> np.ndarray:
        # The cheapest that loses so little is asked.
        first = np.searchsorted(-self.objective, -objective)
        inside = first < len(self.objective)
        first = np.minimum(first, len(self.objective) - 1)
        for column, most in costs.items():
            inside &= self.costs[first, column] <= most
        return inside

    def _made_between(self, k: int) -> Path:
        """Along points above the hulls: from those of choice k to before the next of each hull."""
        left = []
        for p, rows, at in zip(self.points, self.rows, self.pick(k), strict=True):
            spent, better = p.costs[rows] @ self.prices, p.objective[rows] < p.objective[at]
            hull = rows[lower_hull(spent, p.objective[rows])]
            following = hull[np.flatnonzero(hull == at)[0] + 1 :][:1]
            first = float(p.costs[at] @ self.prices)
            ends = float(p.costs[following[0]] @ self.prices) if len(following) else first
            left.append(rows[(rows == at) | (better & (spent >= first) & (spent < ends))])
        path = _path(self.points, left, self.prices)
        # No better than the next, and no dearer: what is between others is no matter of a budget.
        ends, floor = self.dearest, 0.0
        if k + 1 < len(self.lost):
            ends, floor = float(self.costs[k + 1] @ self.prices), float(self.lost[k + 1])
        count = int(((path.costs @ self.prices < ends) & (path.lost >= floor)).sum())
        return replace(
            path,
            costs=path.costs[:count],
            lost=path.lost[:count],
            objective=path.objective[:count],
            dearest=ends,
        )


@dataclass(frozen=True)
class Branch(Path):
    """A path on which one weight stays as it is: it bounds no other choice."""

    def least_objective(self, caps: np.ndarray) -> float:
        return 0.0

    def least_cost(self, objective: float, column: int) -> float:
        return 0.0


def choices_of(
    points: Sequence[Points], limited: Sequence[int], *, even: bool = False
) -> tuple[Choices, ...]:
    """The choices among which every budget of these limited costs (columns) finds its plan.

    ``even``: along paths alone, on which weights of one curve are never far from each other.
    """
    if not points:
        none = np.zeros((1, max(limited, default=0) + 1))
        return (Choices(none, np.zeros(1), np.zeros(1), lambda k: []),)
    columns = _independent(points, limited)
    every = None if even else _undominated_choices(points, columns)
    return _paths(points, columns) if every is None else (every,)


def _independent(points: Sequence[Points], limited: Sequence[int]) -> list[int]:
    """Without costs that are the same multiple of another for every point: bytes of one dtype."""
    every = np.concatenate([p.costs for p in points])
    kept: list[int] = []
    for j in limited:
        one = every[:, j]
        sums = ((one * every[:, i].sum(), every[:, i] * one.sum()) for i in kept)
        if not any(np.allclose(*pair, rtol=1e-12, atol=0.0) for pair in sums):
            kept.append(j)
    return kept


# ----------------------------------------------------------------------------- all that may be best


def _undominated_choices(points: Sequence[Points], columns: list[int]) -> Choices | None:
    """All choices that no other is at least as good as; None where they are too many."""
    most = _PAIRS if len(columns) == 1 else _PAIRS_OF_SEVERAL
    own = [_undominated(p.costs[:, columns], p.objective) for p in points]
    costs, objective = np.zeros((1, len(columns))), np.zeros(1)
    picks = np.zeros((1, 0), dtype=np.int64)
    for p, left in zip(points, own, strict=True):
        if len(objective) * len(left) > most:
            return None
        costs = (costs[:, None] + p.costs[left][:, columns]).reshape(-1, len(columns))
        objective = (objective[:, None] + p.objective[left]).ravel()
        kept = _undominated(costs, objective)
        costs, objective = costs[kept], objective[kept]
        before, which = np.divmod(kept, len(left))
        picks = np.column_stack([picks[before], left[which]])
    return _listed(points, picks)


def _listed(points: Sequence[Points], picks: np.ndarray) -> Choices:
    """Choices as rows of one point a weight."""

    def total(of: Callable[[Points], np.ndarray]) -> np.ndarray:
        return np.sum([of(p)[picks[:, i]] for i, p in enumerate(points)], axis=0)

    return Choices(
        total(lambda p: p.costs),
        total(lambda p: p.distortion),
        total(lambda p: p.objective),
        lambda k: picks[k].tolist(),
    )


def _undominated(costs: np.ndarray, objective: np.ndarray) -> np.ndarray:
    """The rows to which no other is at least as good in every cost and in the objective."""
    order = np.lexsort((objective, *costs.T[::-1]))
    if costs.shape[1] == 1:
        sorted_ = objective[order]
        better = np.append(True, sorted_[1:] < np.minimum.accumulate(sorted_)[:-1])
        return order[better]
    # What is at least as good comes before, in this order.
    table = np.column_stack([costs, objective])[order]
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, len(table), 256):
        block = np.arange(start, min(start + 256, len(table)))
        block = block[~_covered(table[block], table[kept])]
        inside = (table[block][:, None] >= table[block]).all(-1)
        block = block[~np.tril(inside, -1).any(1)]
        kept = np.append(kept, block)
    return order[kept]


def _covered(table: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Which rows have another row ``by`` that is nowhere larger."""
    found = np.ones((len(table), len(by)), dtype=bool)
    for column, other in zip(table.T, by.T, strict=True):
        found &= column[:, None] >= other
    return np.asarray(found.any(1))


# ---------------------------------------------------------------------------------------- the paths


def _paths(points: Sequence[Points], columns: list[int]) -> tuple[Path, ...]:
    """A path for each mixture of costs; each cost alone is one of them."""
    largest = np.sum([p.costs[:, columns].max(0) for p in points], axis=0)
    several = itertools.product(_MIXTURES.get(len(columns), (0, 1)), repeat=len(columns))
    mixtures = {tuple(np.array(m) / max(m)): m for m in several if any(m)}
    found = []
    for mixture in mixtures:
        prices = np.zeros(points[0].costs.shape[1])
        prices[columns] = np.array(mixture) / np.maximum(largest, 1e-300)
        rows = [np.arange(len(p.labels)) for p in points]
        found.append(_path(points, rows, prices))
        found += _branches(points, rows, prices)
    return tuple(found)


def _branches(
    points: Sequence[Points], rows: Sequence[np.ndarray], prices: np.ndarray
) -> Iterator[Path]:
    """Paths on which the weight of the largest step stays at one end of a large one, for each."""
    hulls = [lower_hull(p.costs @ prices, p.objective) for p in points]
    spent = [p.costs[hull] @ prices for p, hull in zip(points, hulls, strict=True)]
    largest = np.array([np.diff(each).max(initial=0.0) for each in spent])
    i = int(largest.argmax())
    total = sum(float(each[-1]) for each in spent)
    least = max(_LARGE * total, _LARGER * float(np.median(largest)))
    large = np.flatnonzero(np.diff(spent[i]) >= least)
    for end in sorted({*large.tolist(), *(large + 1).tolist()}):
        kept = [*rows[:i], hulls[i][end : end + 1], *rows[i + 1 :]]
        yield _path(points, kept, prices, Branch)


def _path(
    points: Sequence[Points],
    rows: Sequence[np.ndarray],
    prices: np.ndarray,
    kind: type[Path] = Path,
) -> Path:
    """From every weight at its cheapest to all at their best, one step of one weight at a time."""
    hulls = [
        own[lower_hull(p.costs[own] @ prices, p.objective[own])]
        for p, own in zip(points, rows, strict=True)
    ]
    steps = []
    for i, (p, hull) in enumerate(zip(points, hulls, strict=True)):
        gains, extra = -np.diff(p.objective[hull]), np.diff(p.costs[hull] @ prices)
        # The next step of a weight is never worth more than the one before it.
        worth = np.minimum.accumulate(gains / np.maximum(extra, 1e-300))
        number = np.arange(len(worth))
        steps.append(np.column_stack([-worth, number, np.full(len(worth), i), hull[1:]]))
    every = np.concatenate(steps)
    # Of steps that are worth the same, weights take one each in turn.
    every = every[np.lexsort(every.T[2::-1])]
    numbers, weights, to = every[:, 1:].astype(int).T
    start = [int(hull[0]) for hull in hulls]
    firsts = np.cumsum([0, *(len(hull) - 1 for hull in hulls[:-1])])
    taken = firsts[weights] + numbers

    def along(of: Callable[[Points], np.ndarray]) -> np.ndarray:
        pairs = zip(points, hulls, strict=True)
        return np.concatenate([np.diff(of(p)[hull], axis=0) for p, hull in pairs])[taken]

    def falling(of: Callable[[Points], np.ndarray]) -> np.ndarray:
        """Sums that are made from their small end, so that small ones are exact."""
        least = sum(float(of(p)[hull[-1]]) for p, hull in zip(points, hulls, strict=True))
        return np.cumsum([least, *-along(of)[::-1]])[::-1]

    def pick(k: int) -> list[int]:
        choice = list(start)
        for i, point in zip(weights[:k].tolist(), to[:k].tolist(), strict=True):
            choice[i] = point
        return choice

    first = np.sum([p.costs[k] for p, k in zip(points, start, strict=True)], axis=0)
    return kind(
        np.cumsum(np.concatenate([first[None], along(lambda p: p.costs)]), axis=0),
        falling(lambda p: p.distortion),
        falling(lambda p: p.objective),
        pick,
        points,
        rows,
        prices,
    )


def lower_hull(costs: np.ndarray, objective: np.ndarray) -> np.ndarray:
    """The points of the lower convex hull of objective over cost, as cost grows and it falls."""
    order = np.lexsort((objective, costs))
    falls = np.append(True, objective[order][1:] < np.minimum.accumulate(objective[order])[:-1])
    order = order[falls]
    x, y = costs[order].tolist(), objective[order].tolist()
    hull: list[int] = []
    for k in range(len(order)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[a] - y[b]) * (x[k] - x[a]) >= (y[a] - y[k]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(k)
    return order[hull]
