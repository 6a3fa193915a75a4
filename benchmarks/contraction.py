"""Tensor trains of 2 to 4 cores against their input: the planned order beside other libraries.

    python -m benchmarks.contraction --threads 1 2

The same cores and the same input go to ``torch.einsum``, to opt_einsum (its optimal path, planned
beforehand), to tensorly-torch (through its factors, and by rebuilding the weight; where it is
installed), and to the contraction that tensorize plans and emits: the order that ``autotune=True``
takes, the fastest of the four with the smallest predicted times. Beside it stand the first of those
("predicted") and the one with the fewest FLOPs. Ratios are other over ours: above 1 where ours is
faster; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from benchmarks.linear import BUDGETS, DTYPES, SHAPES
from benchmarks.record import keep
from benchmarks.timing import interleaved
from tensorize import TTSpec, tt
from tensorize.codegen import aten, machine, orders
from tensorize.passes.order import one_order, plan_contraction
from tensorize.passes.timed import fastest_trees

BATCHES = (1, 16, 256)
CONTENDERS, OWN = 4, ("predicted", "fewest FLOPs")
CORES = (2, 3, 4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def balanced(shape: tuple[int, int], count: int, budget: float) -> TTSpec:
    """Modes as equal as they can be, and the largest rank within a share of the parameters."""
    m, n = shape
    split = tt.balanced_modes(m, count), tuple(reversed(tt.balanced_modes(n, count)))
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
def measure(spec: TTSpec, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of ours, and every other's over ours; how far the results differ."""
    torch.manual_seed(0)
    cores = [torch.randn(shape, dtype=dtype) / max(shape) ** 0.5 for shape in spec.core_shapes]
    x = torch.randn(batch, spec.shape[1], dtype=dtype)
    trees = fastest_trees(spec, "columns", machine.current(), batch, CONTENDERS, _name(dtype))
    fewest = plan_contraction(spec).piece(batch).tree
    plans = [one_order(spec, "columns", tree, batch, batch) for tree in trees]
    plan = orders.fastest(plans, batch, dtype)
    least = one_order(spec, "columns", fewest, batch, batch)
    chosen = {"tensorize": plan, "predicted": plans[0], "fewest FLOPs": least}
    calls = {name: partial(aten.build(each), x, cores) for name, each in chosen.items()}
    calls |= others(spec, cores, x)
    want = opt_einsum.contract(
        equation(spec),
        *(c.double() for c in cores),
        x.double().reshape(batch, *(spec.size[a] for a in spec.columns)),
    ).reshape(batch, -1)
    off = {
        name: float((call().double() - want).norm() / want.norm()) for name, call in calls.items()
    }
    worst = max(off.values())
    if worst > 0.1:
        raise AssertionError(f"{spec}: a result is off by {worst}: {off}")
    found = interleaved(calls, rounds)
    ratios = {name: found[name].over(found["tensorize"]) for name in calls if name != "tensorize"}
    return {
        "microseconds": 1e6 * found["tensorize"].wall,
        "order": str(plan.pieces[0].tree),
        **ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        cells: dict[str, Any] = {}
        for dtype in options.dtypes:
            for shape in SHAPES:
                for count in CORES:
                    for budget in options.budgets:
                        for batch in options.batches:
                            spec = balanced(shape, count, budget)
                            name = f"{shape[0]}x{shape[1]} {count} cores {budget} B={batch} {dtype}"
                            cells[name] = found = measure(
                                spec, batch, DTYPES[dtype], options.rounds
                            )
                            shown = ", ".join(
                                f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, float)
                            )
                            print(f"{threads} threads, {name}: {shown}", flush=True)
        results[f"{threads} threads"] = {"summary": summary(cells), "cells": cells}
        print(f"{threads} threads: {summary(cells)}")
    print(f"kept in {keep('contraction', results)}")


def summary(cells: dict[str, Any]) -> dict[str, float]:
    """Ours against the best of the others, cell by cell, and against each in the mean."""
    peers = sorted(set(chain.from_iterable(cells.values())) - {"microseconds", "order", *OWN})
    best = [min(found[p] for p in peers if p in found) for found in cells.values()]
    logs = [math.log(ratio) for ratio in best]
    means = {
        p: math.exp(statistics.mean(math.log(f[p]) for f in cells.values() if p in f))
        for p in (*OWN, *peers)
    }
    return {
        "over the best, geometric mean": math.exp(statistics.mean(logs)),
        "over the best, smallest": min(best),
        "cells below .95": sum(ratio < 0.95 for ratio in best),
        "cells": len(best),
        **{f"over {p}, geometric mean": mean for p, mean in means.items()},
    }


if __name__ == "__main__":
    main()
