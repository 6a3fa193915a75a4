"""Contraction orders by predicted time: what runs, beside what FLOPs alone would choose.

The order with the fewest FLOPs is often not the fastest: thin matmuls run far below the rate of
square ones, and what is rebuilt must be written and read. So each order is priced on the machine
(``roofline``) at batches from 1 to 4096, and the fastest is taken in each of at most three ranges.
The ends of the ranges are common to all weights of a model: under dynamic shapes they are what a
graph is compiled again for, at most twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np

from tensorize.ir.machine import Machine
from tensorize.ir.orders import ContractionPlan, Tree, typical_batch
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import one_order, piece_of, undominated_trees
from tensorize.passes.orders.roofline import tree_times

GRID = tuple(2**k for k in range(13))
"""The batches at which orders are priced."""

BREAKPOINTS = (9, 129)
"""Where ranges begin: generating, small batches, large ones."""

_TIMED = 4  # orders of each range, where they are timed


def all_trees(operands: Sequence[Tree]) -> Iterator[Tree]:
    """Every way to contract the operands in pairs."""
    if len(operands) == 1:
        yield operands[0]
        return
    first, rest = operands[0], operands[1:]
    for size in range(len(rest)):
        for chosen in combinations(range(len(rest)), size):
            inside = [first, *(rest[k] for k in chosen)]
            outside = [rest[k] for k in range(len(rest)) if k not in chosen]
            for left in all_trees(inside):
                for right in all_trees(outside):
                    yield left, right


@lru_cache(maxsize=4096)
def priced(
    spec: TTSpec, contract: str, machine: Machine, dtype: str
) -> tuple[tuple[Tree, ...], np.ndarray]:
    """Orders that may be the fastest, and their microseconds (orders, batches of ``GRID``).

    All of them for up to four cores; of more, those that no other is better than in FLOPs and in
    the size of what lies between, at every batch.
    """
    few = len(spec.cores) <= 4
    trees = (
        tuple(all_trees(("x", *range(len(spec.cores)))))
        if few
        else undominated_trees(spec, contract)
    )
    rows = np.array(GRID, dtype=float)
    times = np.stack([tree_times(machine, rows, spec, contract, tree, dtype) for tree in trees])
    return trees, times


def fastest_trees(
    spec: TTSpec, contract: str, machine: Machine, batch: int, count: int, dtype: str = "float32"
) -> tuple[Tree, ...]:
    """The orders with the smallest predicted times for a batch, fastest first."""
    trees, times = priced(spec, contract, machine, dtype)
    near = int(np.argmin(np.abs(np.log(np.array(GRID) / batch))))
    return tuple(trees[k] for k in np.argsort(times[:, near], kind="stable")[:count])


def timed_plan(
    spec: TTSpec,
    contract: str,
    machine: Machine,
    breakpoints: Sequence[int] = BREAKPOINTS,
    dtype: str = "float32",
    measured: Mapping[str, tuple[Tree, int]] | None = None,
) -> ContractionPlan:
    """The fastest order in each range of batches; ``breakpoints`` are where the next one begins.

    ``measured`` are orders that were timed, and their layouts, by ``question``: they go before
    predictions.
    """
    trees, times = priced(spec, contract, machine, dtype)
    pieces = []
    for first, last in _ranges(breakpoints):
        cost = _lost(times)[:, _inside(first, last)].sum(1)
        predicted = trees[int(np.argmin(cost))], 0
        asked = question(spec, contract, dtype, first, last)
        tree, layout = (measured or {}).get(asked, predicted)
        # One tree in two ranges is two pieces: what is laid out well for few rows is not for many.
        pieces.append(replace(piece_of(spec, contract, tree, first, last), layout=layout))
    return ContractionPlan(spec, contract, tuple(pieces))


def question(spec: TTSpec, contract: str, dtype: str, first: int, last: int | None) -> str:
    """What an order that was timed is remembered by."""
    return f"{spec} {contract} {dtype} {first} to {last or 'any'}"


def contenders(
    spec: TTSpec,
    contract: str,
    machine: Machine,
    breakpoints: Sequence[int] | None = None,
    dtype: str = "float32",
) -> Iterator[tuple[str, tuple[int, ...], tuple[ContractionPlan, ...]]]:
    """What is to be timed: for each range its question, two batches, and the best few.

    The batches are the first and the one in the middle; where there is no last one twice as many.
    """
    for first, last in _ranges(BREAKPOINTS if breakpoints is None else breakpoints):
        middle = typical_batch(first, last)
        trees = fastest_trees(spec, contract, machine, middle, _TIMED, dtype)
        plans = tuple(one_order(spec, contract, tree, first, last) for tree in trees)
        batches = (first, middle) if last is not None or first == 1 else (2 * first, 2 * middle)
        yield question(spec, contract, dtype, first, last), batches, plans


def common_breakpoints(
    uses: Iterable[tuple[TTSpec, str, str]], machine: Machine
) -> tuple[int, ...]:
    """The ``BREAKPOINTS`` at which the order of any (spec, contract, dtype) changes.

    So what a weight costs does not depend on the others of its model.
    """
    turns = {turn for use in dict.fromkeys(uses) for turn in _turns(*use, machine)}
    return tuple(sorted(turns))


@lru_cache(maxsize=4096)
def _turns(spec: TTSpec, contract: str, dtype: str, machine: Machine) -> tuple[int, ...]:
    pieces = timed_plan(spec, contract, machine, dtype=dtype).pieces
    return tuple(b.first_batch for a, b in pairwise(pieces) if a.tree != b.tree)


def _lost(times: np.ndarray) -> np.ndarray:
    """By what each order is slower than the best, as a logarithm."""
    return np.log(times / times.min(0))


def _ranges(breakpoints: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    starts = (1, *breakpoints)
    for k, first in enumerate(starts):
        yield first, starts[k + 1] - 1 if k + 1 < len(starts) else None


def _inside(first: int, last: int | None) -> np.ndarray:
    grid = np.array(GRID)
    return (grid >= first) & (grid <= (last or GRID[-1]))
