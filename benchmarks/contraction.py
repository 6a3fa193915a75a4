"""Tensor trains of 2 to 4 cores against their input: the planned order beside other libraries.

    python -m benchmarks.contraction --threads 1 2

The same cores and the same input go to ``torch.einsum``, to opt_einsum (its optimal path, planned
beforehand), to tensorly-torch (through its factors, and by rebuilding the weight; where it is
installed), and to the contraction that tensorize plans and emits: the one that ``autotune=True``
makes of these cores, whose order and layout are timed for a range of rows, not for just these.
Beside it stand the one that it makes untimed ("predicted") and the order with the fewest FLOPs,
each for these rows. Ratios are other over ours: above 1
where ours is faster; medians of interleaved rounds, with one thread of the processor's time.
"The rate" is the time that the fewest FLOPs would take at the rate of one large product, over ours:
what no implementation by products can be below.
Results are kept after every cell, and ``--resume`` goes on with a run that was cut.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, product
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from benchmarks.linear import BATCHES, DTYPES, options_of_grid
from benchmarks.record import cell_by_cell
from benchmarks.timing import interleaved
from tensorize import TTSpec
from tensorize.algebra.modes import balanced_modes
from tensorize.algebra.reconstruct import reconstruct
from tensorize.api.autotune import fastest_orders
from tensorize.codegen.aten import emit as aten
from tensorize.codegen.machine import rates
from tensorize.ir.orders import ContractionPlan
from tensorize.passes.orders.by_flops import one_order, plan_contraction
from tensorize.passes.orders.by_time import timed_plan
from tensorize.weight import products
from tensorize.weight.contractions import Asked, common_breakpoints
from tensorize.weight.precision import multiplied_in

RATE, LARGE = "the rate", 2048
OWN = "predicted", "fewest FLOPs", RATE
CORES = (2, 3, 4)
LONG, FAR = 1.0, 5
"""What takes over so many seconds, and so many times as long as ours, is timed once."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a weight (m, n), the cores, the share of parameters, rows, dtype."""

    shape: tuple[int, int]
    cores: int
    budget: float
    batch: int
    dtype: str

    def __str__(self) -> str:
        m, n = self.shape
        return f"{m}x{n} {self.cores} cores {self.budget} B={self.batch} {self.dtype}"


def balanced(shape: tuple[int, int], count: int, budget: float) -> TTSpec:
    """Modes as equal as they can be, and the largest rank within a share of the parameters."""
    m, n = shape
    split = balanced_modes(m, count), tuple(reversed(balanced_modes(n, count)))
    low, high = 1, max(shape)
    while low < high:
        middle = (low + high + 1) // 2
        if TTSpec(*split, (middle,) * (count - 1)).parameters <= budget * m * n:
            low = middle
        else:
            high = middle - 1
    return TTSpec(*split, (low,) * (count - 1))


def equation(spec: TTSpec) -> str:
    """y = x Wᵀ as one einsum over the cores and x with its columns apart."""
    letters = {name: opt_einsum.get_symbol(k) for k, (name, _) in enumerate(spec.sizes)}
    batch = opt_einsum.get_symbol(len(letters))
    cores = ["".join(letters[a] for a in core) for core in spec.cores]
    x = batch + "".join(letters[a] for a in spec.columns)
    return f"{','.join([*cores, x])}->{batch}{''.join(letters[a] for a in spec.rows)}"


def others(spec: TTSpec, cores: list[Tensor], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What other libraries make of the same cores and the same input."""
    text = equation(spec)
    apart = x.reshape(len(x), *(spec.size[a] for a in spec.columns))
    expression = opt_einsum.contract_expression(
        text, *(c.shape for c in cores), apart.shape, optimize="optimal"
    )
    found: dict[str, Callable[[], Tensor]] = {
        "torch.einsum": lambda: torch.einsum(text, *cores, apart).reshape(len(x), -1),
        "opt_einsum": lambda: expression(*cores, apart, backend="torch").reshape(len(x), -1),
    }
    return found | _tltorch(spec, cores, x)


def _tltorch(spec: TTSpec, cores: list[Tensor], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        from tltorch.factorized_tensors.tensorized_matrices import BlockTT
        from tltorch.functional.factorized_linear import linear_blocktt
    except ImportError:
        return {}
    ranks = (1, *spec.ranks, 1)
    shapes = zip(ranks, spec.row_modes, spec.column_modes, ranks[1:], strict=False)
    factors = [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)]
    weight = BlockTT(factors, tensorized_shape=(spec.row_modes, spec.column_modes), rank=ranks)
    return {
        "tltorch factorized": lambda: linear_blocktt(x, weight),
        "tltorch reconstructed": lambda: x @ weight.to_matrix().t(),
    }


@torch.no_grad()
def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    """Microseconds of ours, and every other's time over ours; the order and its layout."""
    spec, dtype = balanced(cell.shape, cell.cores, cell.budget), DTYPES[cell.dtype]
    torch.manual_seed(0)
    cores = [torch.randn(shape, dtype=dtype) / max(shape) ** 0.5 for shape in spec.core_shapes]
    x = torch.randn(cell.batch, spec.shape[1], dtype=dtype)
    tuned, predicted = plans_of(spec, dtype, torch.get_num_threads())
    fewest = plan_contraction(spec).piece(cell.batch).tree
    least = one_order(spec, "columns", fewest, cell.batch, cell.batch)
    chosen = {"tensorize": tuned, "predicted": predicted, "fewest FLOPs": least}
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(products.matmul, spec, {"columns": aten.build(each)}, cores, x, "columns")
        for name, each in chosen.items()
    }
    calls |= others(spec, cores, x)
    weight = reconstruct(spec, [core.double() for core in cores])
    once = _checked(calls, x.double() @ weight.t())
    far = {n for n, took in once.items() if took > max(LONG, FAR * once["tensorize"])}
    found = interleaved({n: call for n, call in calls.items() if n not in far}, rounds)
    ours = found["tensorize"]
    ratios = {
        name: once[name] / once["tensorize"] if name in far else found[name].over(ours)
        for name in calls
        if name != "tensorize"
    }
    ratios[RATE] = least.flops(cell.batch) / full_rate(dtype, torch.get_num_threads()) / ours.wall
    piece = tuned.piece(cell.batch)
    return {"microseconds": 1e6 * ours.cpu, "order": str((piece.tree, piece.layout)), **ratios}


@lru_cache(maxsize=1)  # cells of one weight come one after the other
def plans_of(
    spec: TTSpec, dtype: torch.dtype, threads: int
) -> tuple[ContractionPlan, ContractionPlan]:
    """What runs in a model of this weight with ``autotune=True``, and without, by its threads."""
    breakpoints = common_breakpoints([(spec, dtype)])
    asked = Asked(spec, "columns", "cpu", multiplied_in(dtype, "cpu"), breakpoints)
    made = partial(timed_plan, spec, "columns", rates.current(), breakpoints, asked.dtype)
    return made(fastest_orders(asked)), made()


@lru_cache
def full_rate(dtype: torch.dtype, threads: int) -> float:
    """FLOPs a second of a product of two matrices (LARGE, LARGE) by so many threads, the best."""
    a, b = (torch.randn(LARGE, LARGE).to(dtype) for _ in range(2))
    return 2 * LARGE**3 / min(interleaved({"product": lambda: a @ b}, 7)["product"].walls)


def _checked(calls: dict[str, Callable[[], Tensor]], want: Tensor) -> dict[str, float]:
    """Seconds of one call of each.

    Raises:
        AssertionError: results differ by more than rounding does.
    """
    seconds = {}
    for name, call in calls.items():
        began = time.perf_counter()
        got = call()
        seconds[name] = time.perf_counter() - began
        off = float((got.double() - want).norm() / want.norm())
        if off > 0.1:
            raise AssertionError(f"{name} is off by {off}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options_of_grid(parser, BATCHES, rounds=5)
    parser.add_argument("--cores", nargs="+", type=int, choices=CORES, default=list(CORES))
    options = parser.parse_args()
    grid = product(options.dtypes, options.shapes, options.cores, options.budgets, options.batches)
    cell_by_cell(
        "contraction",
        [Cell(shape, cores, budget, b, dtype) for dtype, shape, cores, budget, b in grid],
        partial(measure, rounds=options.rounds),
        summary,
        threads=options.threads,
        resume=options.resume,
    )


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """Ours against the best of the others, cell by cell, and against each in the mean."""
    peers = sorted(set(chain.from_iterable(cells.values())) - {"microseconds", "order", *OWN})
    best = {name: min(found[p] for p in peers if p in found) for name, found in cells.items()}

    def mean(ratios: Iterable[float]) -> float:
        return math.exp(statistics.mean(math.log(ratio) for ratio in ratios))

    dtypes = {name.split()[-1] for name in cells}
    return {
        "over the best, geometric mean": mean(best.values()),
        **{
            f"over the best, {dtype}": mean(r for n, r in best.items() if n.endswith(dtype))
            for dtype in sorted(dtypes)
        },
        "over the best, smallest": min(best.values()),
        "cells below .95": sum(ratio < 0.95 for ratio in best.values()),
        "over the best, at most": mean(best[n] / found[RATE] for n, found in cells.items()),
        "cells": len(best),
        **{
            f"over {p}, geometric mean": mean(f[p] for f in cells.values() if p in f)
            for p in (*OWN, *peers)
        },
    }


if __name__ == "__main__":
    main()
