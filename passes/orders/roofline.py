"""Predicted microseconds of a matmul and of a contraction tree: the roofline of a machine.

A matmul of B rows costs a call, and then the larger of its FLOPs at the rate of that many rows and
its bytes at the machine's bandwidth (Williams, Waterman & Patterson 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorize.ir.machine import Machine
from tensorize.ir.orders import Tree
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import pairs_of

_BYTES = {"float64": 8, "float32": 4}


def bytes_of(dtype: str) -> int:
    """Of one element."""
    return _BYTES.get(dtype, 2)


def matmul_time(
    machine: Machine, rows: Any, inner: Any, columns: Any, dtype: str, *, stacked: Any = 1
) -> Any:
    """Microseconds of (rows, inner) @ (inner, columns); arrays of sizes give an array.

    ``stacked``: how many of them one batched call does.
    """
    size = bytes_of(dtype)
    moved = stacked * size * (rows * inner + inner * columns + rows * columns)
    flops = 2.0 * stacked * rows * inner * columns
    work = np.maximum(flops / _rate(machine, rows, dtype), moved / machine.bandwidth)
    return 1e6 * (machine.launch + work)


def _rate(machine: Machine, rows: Any, dtype: str) -> Any:
    rates = dict(machine.rates)
    # float16 is as fast as bfloat16, float64 half as fast as float32.
    known = rates["bfloat16" if bytes_of(dtype) == 2 else "float32"]
    found = np.exp(np.interp(np.log(rows), np.log(machine.rows), np.log(known)))
    return found / 2 if dtype == "float64" else found


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
