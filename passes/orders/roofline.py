"""Predicted microseconds of a contraction tree, by the roofline of a machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorize.ir.machine import Machine, bytes_of, matmul_time
from tensorize.ir.orders import Tree
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import pairs_of


def tree_times(
    machine: Machine, rows: Any, spec: TTSpec, contract: str, tree: Tree, dtype: str
) -> Any:
    """Microseconds of a contraction tree, for a number of rows or an array of them.

    Each contraction is one matmul, and a copy of what it gives into the order that is wanted next.
    A core, or the input, is copied before it where what is summed stands neither first nor last in
    it: of two orders with the same FLOPs one may so be half as fast.
    """
    inputs = spec.columns if contract == "columns" else spec.rows
    leaves = {frozenset(axes): axes for axes in (*spec.cores, (*spec.batch, "B", *inputs))}
    total: Any = 0.0
    for pair in pairs_of(spec, contract, tree):
        both = pair.left & pair.right

        def product(axes: frozenset[str]) -> Any:
            known = math.prod(spec.size[axis] for axis in axes if axis != "B")
            return known * rows if "B" in axes else known

        count = product(both & pair.kept)
        inner = product(both - pair.kept)
        height, width = product(pair.left - both), product(pair.right - both)
        # A stack of thin products runs at the rate of one of them, whichever side is thin.
        thin, wide = np.minimum(height, width), np.maximum(height, width)
        total = total + matmul_time(machine, thin, inner, wide, dtype, stacked=count)
        copied = count * height * width
        for side in (pair.left, pair.right):
            apart = [axis for axis in leaves.get(side, ()) if axis not in both & pair.kept]
            if not _stands_apart(apart, both - pair.kept):
                copied = copied + product(side)
        total = total + 1e6 * 2 * bytes_of(dtype) * copied / machine.bandwidth
    return total


def _stands_apart(axes: Sequence[str], summed: frozenset[str]) -> bool:
    """Whether what is summed is the first or the last of some axes; of none it is."""
    count = len(summed)
    return not axes or summed in (frozenset(axes[:count]), frozenset(axes[len(axes) - count :]))
