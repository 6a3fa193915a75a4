"""What the matmuls of a weight take on a machine, predicted from its rates.

Times are in microseconds (``roofline``); trains run in the order that ``timed`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorize.ir.machine import Machine
from tensorize.ir.sites import Site
from tensorize.ir.spec import BLOCK, LOW_RANK, TTSpec
from tensorize.passes.orders.by_time import timed_plan
from tensorize.passes.orders.roofline import bytes_of, matmul_time, tree_times


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


def first_times(
    site: Site, spec: TTSpec, batch_sizes: Sequence[int], machine: Machine
) -> np.ndarray:
    """Microseconds of the first of a low-rank linear's two products."""
    (rank,), (_, n) = spec.ranks, site.matrix
    return np.array([matmul_time(machine, rows, n, rank, site.dtype) for rows in batch_sizes])


def spec_times(
    site: Site, spec: TTSpec, batch_sizes: Sequence[int], machine: Machine
) -> np.ndarray:
    """Microseconds of every use of a factorized weight, for each number of input rows."""
    if spec.format == LOW_RANK:
        return low_rank_times(site, np.array(spec.ranks), batch_sizes, machine)[0]
    total = np.zeros(len(batch_sizes))
    for use in site.uses:
        if use.contract == "lookup":
            total += [_train_lookup_time(machine, rows, spec, site.dtype) for rows in batch_sizes]
            continue
        plan = timed_plan(spec, use.contract, machine, dtype=site.dtype)
        for k, rows in enumerate(batch_sizes):
            tree = plan.piece(rows).tree
            total[k] += tree_times(machine, rows, spec, use.contract, tree, site.dtype)
    return total


def _lookup_time(machine: Machine, rows: Any, width: Any, dtype: str) -> Any:
    """Rows copied out of a table: read and written."""
    moved = 2 * bytes_of(dtype) * rows * width
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
