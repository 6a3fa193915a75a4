"""Weights in the order of their use, each with what it meets in a dense and in a small model.

Every batch runs through both models at once, and waits at each weight until that is settled; what
the small model multiplies the later ones by is then what they will really see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from tensorize.ir.sites import Batch
from tensorize.passes.rewrite.drift import Drift, Pair, Rows

T = TypeVar("T")
Masks = Callable[[Batch, str], Tensor | None]
"""Which rows of a batch count for a weight; None: all do."""


def in_order(
    order: Sequence[str],
    batches: Sequence[T],
    pair: Callable[[T], Pair],
    rows: Mapping[str, Rows],
    masks: Masks,
) -> Iterator[tuple[str, Drift]]:
    """Every weight in turn, with how far its inputs drifted.

    The runs go on when the next one is asked for. To be closed: what waits is stopped then.
    """
    runs: list[Pair] = []
    drift: Drift | None = None
    try:
        runs.extend(map(pair, batches))
        for place, name in enumerate(order):
            there = [each for each in runs if all(one.reach(place) for one in each)]
            counted = [masks(each[0].batch, name) for each in there]
            if drift is None or not drift.are_of(there, counted):
                drift = Drift(rows[name], there, counted)
            yield name, drift
    finally:
        for each in runs:
            for one in each:
                one.stop()
