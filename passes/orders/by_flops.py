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
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

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
def plan_contraction(spec: TTSpec, contract: str = "columns") -> ContractionPlan:
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

    Returns:
        The plan. Its pieces cover every batch from 1 on.

    Raises:
        ValueError: ``contract`` is neither side, or there are too many cores.
    """
    if contract not in ("columns", "rows"):
        raise ValueError(f"contract is 'columns' or 'rows', got {contract!r}")
    orders = _search(spec, contract, _envelope)
    return ContractionPlan(spec, contract, tuple(_pieces(orders)))


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
    return tuple(order.tree for order in _search(spec, contract, _undominated))


# -------------------------------------------------------------------------------- the search


def _search(
    spec: TTSpec, contract: str, keep: Callable[[list[_Order]], list[_Order]]
) -> list[_Order]:
    """Every tree over all operands that ``keep`` finds worth it, as it does those of all parts.

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


def _pieces(orders: list[_Order]) -> Iterator[ContractionPiece]:
    """Walk from batch 1 upwards, from each best order to the first batch where another beats it."""

    def rank(batch: int, order: _Order) -> tuple[object, ...]:
        # A lower slope before a smaller peak: where two lines meet, it is the one that stays.
        price, peak = order.flops(batch), order.peak(batch)
        return price, order.slope, peak, order.peak_slope, order.peak_constant, str(order.tree)

    starts = [1]
    for first in starts:
        best = min(orders, key=partial(rank, first))
        turns = (
            (order.constant - best.constant) // (best.slope - order.slope) + 1
            for order in orders
            if order.slope < best.slope
        )
        turn = min(turns, default=None)
        yield ContractionPiece(
            best.tree,
            first,
            None if turn is None else turn - 1,
            *(best.constant, best.slope, best.peak_constant, best.peak_slope),
        )
        starts += [] if turn is None else [turn]
