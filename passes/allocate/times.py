"""What the matmuls of a weight take on a machine, predicted from its rates.

Times are in microseconds (``roofline``); trains run in the order that ``timed`` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorize.formats.low_rank import first_time
from tensorize.formats.order import in_order_time
from tensorize.formats.registry import format_of
from tensorize.ir.machine import Machine, lookup_time, matmul_time
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.orders.by_time import timed_plan
from tensorize.passes.orders.roofline import tree_times


def dense_times(site: Site, batch_sizes: Sequence[int], machine: Machine) -> np.ndarray:
    """Microseconds of every use of a dense weight, for each number of input rows."""
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    total = np.zeros(len(batch_sizes))
    for use in site.uses:
        for k, rows in enumerate(batch_sizes):
            if use.contract == "lookup":
                total[k] += lookup_time(machine, rows, n, site.dtype)
            else:
                total[k] += matmul_time(machine, rows, n, m, site.dtype)
    return total


def first_times(site: Site, spec: Spec, batch_sizes: Sequence[int], machine: Machine) -> np.ndarray:
    """Microseconds of the first of a low-rank linear's two products (the last axis: batches)."""
    times = [first_time(spec, rows, machine, site.dtype) for rows in batch_sizes]
    return np.stack(times, axis=-1)


def spec_times(site: Site, spec: Spec, batch_sizes: Sequence[int], machine: Machine) -> np.ndarray:
    """Microseconds of every use of a factorized weight, for each number of input rows (the last
    axis)."""
    form = format_of(spec)
    total = np.zeros((*np.shape(sum(spec.ranks)), len(batch_sizes)))
    for use in site.uses:
        whole = bool(spec.pivoted) and (use.convolves or form.planned)
        run = spec.plain if whole else spec
        if form.planned and use.contract != "lookup":
            assert isinstance(run, TTSpec)
            plan = timed_plan(run, use.contract, machine, dtype=site.dtype)
            for k, rows in enumerate(batch_sizes):
                tree = plan.piece(rows).tree
                total[k] += tree_times(machine, rows, run, use.contract, tree, site.dtype)
        else:
            for k, rows in enumerate(batch_sizes):
                total[..., k] += form.time(run, use.contract, rows, machine, site.dtype)
        if whole:
            total += np.asarray(_whole_time(site, spec, machine))[..., None]
    return total


def _whole_time(site: Site, spec: Spec, machine: Machine) -> Any:
    """Microseconds of identities that are put back at every call, by a pass over each core."""
    if not isinstance(spec, TTSpec) or not format_of(spec).planned:
        return in_order_time(machine, *spec.ranks, site.matrix[1], site.dtype)
    later = zip(spec.whole_shapes[1:], spec.widths, strict=True)
    passes = ((math.prod(shape) // width, width) for shape, width in later)
    return sum(in_order_time(machine, *each, site.dtype) for each in passes)
