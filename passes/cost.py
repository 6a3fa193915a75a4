"""What the matmuls of a weight take on a machine, predicted from its rates.

A matmul of B rows costs a call, and then the larger of its FLOPs at the rate of that many rows and
its bytes at the machine's bandwidth (the roofline; Williams, Waterman & Patterson 2009). Times are
in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorize.ir import BLOCK, LOW_RANK, Machine, Site, Tree, TTSpec
from tensorize.passes.order import plan_contraction

_BYTES = {"float64": 8, "float32": 4}


def matmul_time(
    machine: Machine, rows: Any, inner: Any, columns: Any, dtype: str, *, stacked: int = 1
) -> Any:
    """Microseconds of (rows, inner) @ (inner, columns); arrays of sizes give an array.

    ``stacked``: how many of them one batched call does.
    """
    size = _BYTES.get(dtype, 2)
    moved = stacked * size * (rows * inner + inner * columns + rows * columns)
    flops = 2.0 * stacked * rows * inner * columns
    work = np.maximum(flops / _rate(machine, rows, dtype), moved / machine.bandwidth)
    return 1e6 * (machine.launch + work)


def _rate(machine: Machine, rows: Any, dtype: str) -> Any:
    rates = dict(machine.rates)
    # float16 is as fast as bfloat16, float64 half as fast as float32.
    known = rates["bfloat16" if _BYTES.get(dtype, 2) == 2 else "float32"]
    found = np.exp(np.interp(np.log(rows), np.log(machine.rows), np.log(known)))
    return found / 2 if dtype == "float64" else found


def dense_times(site: Site, batch_sizes: Sequence[int], machine: Machine) -> np.ndarray:
    """Microseconds of every use of a dense weight, for each number of input rows."""
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    total = np.zeros(len(batch_sizes))
    for use in site.uses:
        for k, rows in enumerate(batch_sizes):
            if use.contract == "lookup":
                total[k] += _lookup_time(machine, rows, n, site.dtype)
            else:
                total[k] += matmul_time(machine, rows, n, m, site.dtype)
    return total


def low_rank_times(
    site: Site, ranks: np.ndarray, batch_sizes: Sequence[int], machine: Machine
) -> np.ndarray:
    """(ranks, batch sizes): microseconds of every use of the two factors."""
    m, n = site.matrix
    total = np.zeros((len(ranks), len(batch_sizes)))
    for use in site.uses:
        for k, rows in enumerate(batch_sizes):
            if use.contract == "whole":  # rebuilt, then used as a dense one
                took = matmul_time(machine, m, ranks, n, site.dtype)
                took = took + matmul_time(machine, rows, n, m, site.dtype)
            elif use.contract == "lookup":
                took = _lookup_time(machine, rows, ranks, site.dtype)
                took = took + matmul_time(machine, rows, ranks, n, site.dtype)
            else:
                first, second = (n, m) if use.contract == "columns" else (m, n)
                took = matmul_time(machine, rows, first, ranks, site.dtype)
                took = took + matmul_time(machine, rows, ranks, second, site.dtype)
            total[:, k] += took
    return total


def spec_times(
    site: Site, spec: TTSpec, batch_sizes: Sequence[int], machine: Machine
) -> np.ndarray:
    """Microseconds of every use of a factorized weight, for each number of input rows."""
    if spec.format == LOW_RANK:
        return low_rank_times(site, np.array(spec.ranks), batch_sizes, machine)[0]
    total = np.zeros(len(batch_sizes))
    for use in site.uses:
        for k, rows in enumerate(batch_sizes):
            if use.contract == "lookup":
                total[k] += _train_lookup_time(machine, rows, spec, site.dtype)
            else:
                tree = plan_contraction(spec, use.contract).piece(rows).tree
                total[k] += _tree_time(machine, rows, spec, use.contract, tree, site.dtype)
    return total


def _lookup_time(machine: Machine, rows: Any, width: Any, dtype: str) -> Any:
    """Rows copied out of a table: read and written."""
    moved = 2 * _BYTES.get(dtype, 2) * rows * width
    return 1e6 * (machine.launch + moved / machine.bandwidth)


def _train_lookup_time(machine: Machine, rows: int, spec: TTSpec, dtype: str) -> float:
    if spec.format == BLOCK:  # a slice of the left core, a block of the right one, their product
        (rank,), (blocks, width) = spec.ranks, spec.column_modes
        took = _lookup_time(machine, rows, blocks * rank, dtype)
        took += _lookup_time(machine, rows, blocks * rank * width, dtype)
        return took + matmul_time(machine, 1, rank, width, dtype, stacked=rows * blocks)
    total, columns = 0.0, 1
    ranks = (1, *spec.ranks, 1)
    for k, mode in enumerate(spec.column_modes):
        total += _lookup_time(machine, rows, ranks[k] * mode * ranks[k + 1], dtype)
        if k > 0:
            total += matmul_time(machine, rows * columns, ranks[k], mode * ranks[k + 1], dtype)
        columns *= mode
    return total


def _tree_time(
    machine: Machine, rows: int, spec: TTSpec, contract: str, tree: Tree, dtype: str
) -> float:
    """Each contraction of a tree as one matmul, and a copy of what it gives into order."""
    sizes = {**spec.size, "B": rows}
    inputs, outputs = (spec.columns, spec.rows)
    if contract == "rows":
        inputs, outputs = outputs, inputs
    total = 0.0

    def walk(part: Tree, needed: frozenset[str]) -> frozenset[str]:
        nonlocal total
        if not isinstance(part, tuple):
            return _open(spec, inputs, part)
        left_open, right_open = _open(spec, inputs, part[0]), _open(spec, inputs, part[1])
        left, right = walk(part[0], needed | right_open), walk(part[1], needed | left_open)
        summed = (left & right) - needed
        stack = (left & right) & needed

        def product(axes: frozenset[str]) -> int:
            return int(np.prod([sizes[a] for a in axes], dtype=np.int64)) if axes else 1

        free_left, free_right = left - right, right - left
        sides = product(free_left), product(summed), product(free_right)
        total += matmul_time(machine, *sides, dtype, stacked=product(stack))
        result = stack | free_left | free_right
        total += _lookup_time(machine, 1, product(result), dtype) - 1e6 * machine.launch
        return result

    walk(tree, frozenset(("B", *spec.batch, *outputs)))
    return total


def _open(spec: TTSpec, inputs: Sequence[str], part: Tree) -> frozenset[str]:
    if isinstance(part, str):
        return frozenset(("B", *spec.batch, *inputs))
    if isinstance(part, int):
        return frozenset(spec.cores[part])
    return _open(spec, inputs, part[0]) | _open(spec, inputs, part[1])
