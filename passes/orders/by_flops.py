"""Contraction orders: the cheapest pairwise tree over the cores and the input, for every batch.

A contraction tree over the cores and x costs ``constant + slope * B`` FLOPs: what touches x is
proportional to the batch B, what merges cores among themselves does not see it. The answer for all
batches is the lower envelope of these lines; "rebuild the weight, then apply it" is one of them.

The search is exact over all trees, outer products included: a dynamic programme over subsets of the
cores, with and without x (Lam et al. 1997; Pfeifer et al. 2014), in which a subset with x keeps a
set of lines instead of one number. FLOPs of a pair are those of opt_einsum: the product of the
sizes of all its indices, twice when an index is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from tensorize.base.errors import BudgetError
from tensorize.ir.orders import ContractionPiece, ContractionPlan, Tree
from tensorize.ir.spec import TTSpec

MAX_CORES = 12
"""The search visits 3^d pairs of subsets: 2 ms for six cores, about 2 s for twelve."""


class _Order(NamedTuple):
    """One tree of a subset of the operands. Without x, the slopes are 0.

    FLOPs are ``constant + slope * B``. ``peak_constant`` is the largest intermediate without x, and
    ``peak_slope * B`` the largest with x, in elements; operands are not counted, the output is.
    """

    constant: int
    slope: int
    peak_constant: int
    peak_slope: int
    tree: Tree

    def flops(self, batch: int) -> int:
        return self.constant + self.slope * batch

    def peak(self, batch: int) -> int:
        return max(self.peak_constant, self.peak_slope * batch)


@lru_cache(maxsize=4096)
def plan_contraction(
    spec: TTSpec, contract: str = "columns", *, memory_limit: int | None = None
) -> ContractionPlan:
    """The cheapest contraction order of a factorized weight with its input, for every batch.

    The operands are the cores and x, with indices (batch of experts, B, columns) for
    ``contract="columns"`` and (batch of experts, B, rows) for ``"rows"``. With experts, B counts
    the rows of each expert.

    A piece ends where another tree is strictly cheaper. Among trees with the same line the one with
    the smaller peak at the piece's first batch is taken, then the one that grows slower, then the
    one that is first as text.

    Args:
        spec: the factorization, of at most ``MAX_CORES`` cores.
        contract: ``"columns"`` for y = x Wᵀ, ``"rows"`` for y = x W.
        memory_limit: the largest number of elements that an intermediate or the output may have
            (operands, and copies that an implementation makes, are not counted).
            At every batch for which some tree stays within it, the plan has the cheapest tree that
            does. The output alone grows with B, so there is a batch from which none does: from
            there on the plan has the tree of smallest peak (the cheapest of them), and
            ``peak_elements`` says how far above the limit it is.

    Returns:
        The plan. Its pieces cover every batch from 1 on.

    Raises:
        ValueError: ``contract`` is neither side, or there are too many cores.
        BudgetError: no tree stays within ``memory_limit`` at batch 1. The message names the
            smallest possible peak.

    Examples:
        >>> tensorize.plan_contraction(tensorize.TTSpec((8, 8), (4, 8), (5,))).flops(16) > 0
        True
    """
    if contract not in ("columns", "rows"):
        raise ValueError(f"contract is 'columns' or 'rows', got {contract!r}")
    orders = _search(spec, contract, limited=memory_limit is not None)
    if memory_limit is not None:
        smallest = min(order.peak(1) for order in orders)
        if smallest > memory_limit:
            raise BudgetError(
                f"no contraction order of {spec} stays within {memory_limit} elements: the "
                f"smallest possible peak, for one row, is {smallest}",
                way_out=f"allow a memory_limit of at least {smallest}, or take smaller ranks",
            )
    return ContractionPlan(spec, contract, _pieces(orders, memory_limit))


class Pair(NamedTuple):
    """One contraction of a tree: the indices of both operands, and those that are kept."""

    left: frozenset[str]
    right: frozenset[str]
    kept: frozenset[str]


def pairs_of(spec: TTSpec, contract: str, tree: Tree) -> list[Pair]:
    """The contractions of a tree, in the order in which they are run; ``"B"`` is in what has x."""
    inputs, outputs = (spec.columns, spec.rows)
    if contract == "rows":
        inputs, outputs = outputs, inputs
    found: list[Pair] = []

    def names(part: Tree) -> frozenset[str]:
        """All indices that occur in a part."""
        if isinstance(part, str):
            return frozenset(("B", *spec.batch, *inputs))
        if isinstance(part, int):
            return frozenset(spec.cores[part])
        return names(part[0]) | names(part[1])

    def walk(part: Tree, needed: frozenset[str]) -> frozenset[str]:
        if not isinstance(part, tuple):
            return names(part)
        left = walk(part[0], needed | names(part[1]))
        right = walk(part[1], needed | names(part[0]))
        kept = (left | right) & needed
        found.append(Pair(left, right, kept))
        return kept

    walk(tree, frozenset(("B", *spec.batch, *outputs)))
    return found


def piece_of(
    spec: TTSpec, contract: str, tree: Tree, first_batch: int, last_batch: int | None
) -> ContractionPiece:
    """A tree for a range of batches, with its FLOPs and its peak."""

    def elements(indices: frozenset[str]) -> int:
        return math.prod(spec.size[name] for name in indices if name != "B")

    constant = slope = peak_constant = peak_slope = 0
    for pair in pairs_of(spec, contract, tree):
        joint = pair.left | pair.right
        flops = elements(joint) * (2 if joint - pair.kept else 1)
        if "B" in pair.kept:
            slope, peak_slope = slope + flops, max(peak_slope, elements(pair.kept))
        else:
            constant, peak_constant = constant + flops, max(peak_constant, elements(pair.kept))
    return ContractionPiece(
        tree, first_batch, last_batch, constant, slope, peak_constant, peak_slope
    )


def one_order(
    spec: TTSpec, contract: str, tree: Tree, first_batch: int = 1, last_batch: int | None = None
) -> ContractionPlan:
    """The plan that contracts by one tree, whatever the batch; laid out for those in a range."""
    piece = piece_of(spec, contract, tree, first_batch, last_batch)
    return ContractionPlan(spec, contract, (piece,))


def undominated_trees(spec: TTSpec, contract: str) -> tuple[Tree, ...]:
    """The trees that no other is at least as good as, in FLOPs and in peak, at every batch."""
    return tuple(order.tree for order in _search(spec, contract, limited=True))


# -------------------------------------------------------------------------------- the search


def _search(spec: TTSpec, contract: str, *, limited: bool) -> list[_Order]:
    """Every tree over all operands that may be the answer for some batch.

    Subsets of cores are bit masks over the cores, sets of indices bit masks over the index names;
    B is in no set, it is in whatever contains x.
    """
    if len(spec.cores) > MAX_CORES:  # the search would take hours
        raise ValueError(
            f"the exact search over contraction orders takes up to {MAX_CORES} cores, "
            f"{spec} has {len(spec.cores)}: merge neighbouring modes"
        )
    bit = {name: 1 << k for k, (name, _) in enumerate(spec.sizes)}
    sizes = [size for _, size in spec.sizes]

    def mask(names: Iterable[str]) -> int:
        return sum(bit[name] for name in names)

    products = {0: 1}

    def elements(indices: int) -> int:
        if indices not in products:
            low = indices & -indices
            products[indices] = sizes[low.bit_length() - 1] * elements(indices ^ low)
        return products[indices]

    sides = (spec.columns, spec.rows) if contract == "columns" else (spec.rows, spec.columns)
    x, output = (mask((*spec.batch, *side)) for side in sides)
    cores = [mask(core) for core in spec.cores]
    everything = (1 << len(cores)) - 1
    union = [0] * (everything + 1)
    for subset in range(1, everything + 1):
        low = subset & -subset
        union[subset] = union[subset ^ low] | cores[low.bit_length() - 1]
    # What is left of a contracted subset: indices that are in the output or in another operand.
    # A single operand is not contracted and keeps all that it has.
    without_x = [union[s] & (output | x | union[everything ^ s]) for s in range(everything + 1)]
    with_x = [(union[s] | x) & (output | union[everything ^ s]) for s in range(everything + 1)]
    with_x[0] = x
    for k, core in enumerate(cores):
        without_x[1 << k] = core

    def pair(left: int, right: int, kept: int) -> int:
        joint = left | right
        return elements(joint) * (2 if joint & ~kept else 1)

    keep: Callable[[list[_Order]], list[_Order]] = _undominated if limited else _envelope

    merged: list[list[_Order]] = [[] for _ in range(everything + 1)]
    for subset in range(1, everything + 1):
        low = subset & -subset
        if subset == low:
            merged[subset] = [_Order(0, 0, 0, 0, low.bit_length() - 1)]
            continue
        kept = without_x[subset]
        found = []
        # The side with the lowest core comes first: every unordered pair once.
        rest = other = subset ^ low
        while other:
            first = subset ^ other
            cost = pair(without_x[first], without_x[other], kept)
            for a in merged[first]:
                for b in merged[other]:
                    peak = max(a.peak_constant, b.peak_constant, elements(kept))
                    tree = (a.tree, b.tree)
                    found.append(_Order(a.constant + b.constant + cost, 0, peak, 0, tree))
            other = (other - 1) & rest
        merged[subset] = keep(found)

    applied: list[list[_Order]] = [[] for _ in range(everything + 1)]
    applied[0] = [_Order(0, 0, 0, 0, "x")]
    for subset in range(1, everything + 1):
        kept = with_x[subset]
        found = []
        taken = subset
        while taken:
            before = subset ^ taken
            cost = pair(with_x[before], without_x[taken], kept)
            for a in applied[before]:
                for b in merged[taken]:
                    found.append(
                        _Order(
                            a.constant + b.constant,
                            a.slope + cost,
                            max(a.peak_constant, b.peak_constant),
                            max(a.peak_slope, elements(kept)),
                            (a.tree, b.tree),
                        )
                    )
            taken = (taken - 1) & subset
        applied[subset] = keep(found)
    return applied[everything]


def _envelope(orders: list[_Order]) -> list[_Order]:
    """The orders whose line is the lowest at some integer B >= 1; of equal lines, the best peaks.

    Costs of parts add up, so a line that is nowhere the lowest for a subset is nowhere needed. An
    order of a whole is as good as another with the same line unless its peak is larger; peaks of
    parts combine by maximum, so a part whose peak is larger for every B is not needed either.
    """
    by_line: dict[tuple[int, int], list[_Order]] = {}
    for order in orders:
        by_line.setdefault((order.constant, order.slope), []).append(order)
    lines = list(by_line)
    best = min(lines, key=lambda line: (line[0] + line[1], line[1]))
    result = _undominated(by_line[best])
    while True:
        constant, slope = best
        # (first integer batch where it is strictly lower, its cost there, slope, line)
        nexts = [
            (batch := (c - constant) // (slope - s) + 1, c + s * batch, s, (c, s))
            for c, s in lines
            if s < slope
        ]
        if not nexts:
            return result
        best = min(nexts)[-1]
        result += _undominated(by_line[best])


def _undominated(orders: list[_Order]) -> list[_Order]:
    """Drop the orders to which another is at least as good, in cost and in peak, at every B >= 1.

    A line a + b B lies nowhere above another on B >= 1 exactly if neither a + b nor b is larger; in
    the same way max(p, q B) compares by max(p, q) and q. Both relations survive what the search
    does to parts: adding costs, and taking the maximum of peaks.
    """

    def figures(order: _Order) -> tuple[int, int, int, int]:
        return (
            order.constant + order.slope,
            order.slope,
            max(order.peak_constant, order.peak_slope),
            order.peak_slope,
        )

    distinct: dict[tuple[int, int, int, int], _Order] = {}
    for order in orders:
        key = figures(order)
        if key not in distinct or str(order.tree) < str(distinct[key].tree):
            distinct[key] = order
    kept: list[tuple[int, int, int, int]] = []
    # In lexicographic order only an earlier entry can dominate a later one.
    for a in sorted(distinct):
        if not any(b[1] <= a[1] and b[2] <= a[2] and b[3] <= a[3] for b in kept):
            kept.append(a)
    return [distinct[key] for key in kept]


# -------------------------------------------------------------------------------- the pieces


def _pieces(orders: list[_Order], limit: int | None) -> tuple[ContractionPiece, ...]:
    """Walk from batch 1 upwards, from each best order to the next one that beats it."""

    def price(order: _Order, batch: int) -> tuple[int, ...]:
        """What is minimized: FLOPs while the peak fits; first of all the peak where it does not."""
        if limit is None or order.peak(batch) <= limit:
            return 0, order.flops(batch)
        return 1, order.peak(batch), order.flops(batch)

    def rank(order: _Order, batch: int) -> tuple[object, ...]:
        # A lower slope before a smaller peak: where two lines meet, it is the one that stays.
        return (
            price(order, batch),
            order.slope,
            order.peak(batch),
            order.peak_slope,
            order.peak_constant,
            str(order.tree),
        )

    def first_better(order: _Order, current: _Order, batch: int) -> int | None:
        """The first batch after ``batch`` at which ``order`` has the strictly lower price."""
        points = {batch + 1, *_turning_points(order, current, limit)}
        for point in sorted(point for point in points if point > batch):
            if price(order, point) < price(current, point):
                return point
        return None

    pieces = []
    first, current = 1, min(orders, key=lambda order: rank(order, 1))
    while True:
        turns = [
            (turn, order)
            for order in orders
            if (turn := first_better(order, current, first)) is not None
        ]
        last = min(turn for turn, _ in turns) - 1 if turns else None
        pieces.append(
            ContractionPiece(
                tree=current.tree,
                first_batch=first,
                last_batch=last,
                constant=current.constant,
                slope=current.slope,
                peak_constant=current.peak_constant,
                peak_slope=current.peak_slope,
            )
        )
        if last is None:
            return tuple(pieces)
        first = start = last + 1
        current = min(
            (order for turn, order in turns if turn == start), key=lambda order: rank(order, start)
        )


def _turning_points(a: _Order, b: _Order, limit: int | None) -> set[int]:
    """Batches between which the prices of two orders cannot change places.

    Prices compare by FLOPs, whether the peak fits, and peaks: straight lines and maxima of them.
    Where two lines meet at t, the comparison can change at floor(t) (if t is an integer) and after.
    """
    meetings = []
    if a.slope != b.slope:
        meetings.append((a.constant - b.constant) // (b.slope - a.slope))
    if limit is not None:
        meetings += [limit // a.peak_slope, limit // b.peak_slope]
        meetings += [p.peak_constant // q.peak_slope for p in (a, b) for q in (a, b)]
    return {batch + step for batch in meetings for step in (0, 1)}
