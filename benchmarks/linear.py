"""A compressed linear layer beside the dense one, over shapes, batches, budgets and dtypes.

    python -m benchmarks.linear --threads 1 2

What ``tensorize.compile`` makes of one ``nn.Linear`` at a share of its parameters, against the
dense layer (eager, and through inductor), and two ``nn.Linear`` of the same rank written by hand.
A speedup is the dense layer's time over another's, the median of interleaved rounds. Ideal is the
inverse of the share kept: ``speedup x share`` is the part of it that is reached. Results are kept
after every cell, and ``--resume`` goes on with a run that was cut.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import cell_by_cell
from benchmarks.timing import interleaved
from tensorize.weight.install import install

SHAPES = ((3072, 768), (4096, 4096), (4096, 11008))
BATCHES = (1, 16, 256, 2048)
BUDGETS = (0.05, 0.1, 0.25, 0.5)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a weight (m, n), input rows, the share of parameters, the dtype."""

    shape: tuple[int, int]
    batch: int
    budget: float
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} B={self.batch} {self.budget} {self.dtype}"


class ByHand(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, m: int, n: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(n, rank, bias=False, dtype=dtype)
        self.second = nn.Linear(rank, m, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def compressed(m: int, n: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """What tensorize makes of one layer; a weight of that rank, so that nothing is to be solved."""
    with torch.device("meta"):
        dense = nn.Sequential(nn.Linear(n, m, dtype=dtype))
    spec = tensorize.TTSpec.low_rank(m, n, rank)
    cores = [nn.Parameter(torch.randn(s, dtype=dtype) / s[1] ** 0.5) for s in spec.core_shapes]
    install(dense, ("0.weight",), spec, cores)
    layer: Any = dense[0]
    layer.second.bias = nn.Parameter(torch.zeros(m, dtype=dtype))
    return layer


@torch.no_grad()
def measure(cell: Cell, rounds: int, *, inductor: bool) -> dict[str, float]:
    """Speedups over the eager dense layer, and the share of parameters that is really kept."""
    (m, n), dtype = cell.shape, DTYPES[cell.dtype]
    rank = max(1, int(cell.budget * m * n / (m + n)))
    torch.manual_seed(0)
    x = torch.randn(cell.batch, n, dtype=dtype)
    dense = nn.Linear(n, m, dtype=dtype)
    calls: dict[str, nn.Module] = {
        "dense": dense,
        "tensorize": compressed(m, n, rank, dtype),
        "by hand": ByHand(m, n, rank, dtype),
    }
    if inductor:
        torch._dynamo.reset()  # after eight shapes it would leave the layer as it is
        calls["inductor dense"] = torch.compile(dense)  # type: ignore[assignment]
    found = interleaved({name: partial(module, x) for name, module in calls.items()}, rounds)
    speedups = {name: 1 / found[name].over(found["dense"]) for name in calls if name != "dense"}
    return {**speedups, "share": rank * (m + n) / (m * n), "dense µs": 1e6 * found["dense"].wall}


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """How much of the ideal is reached, over all cells and in those of each dtype."""

    def of(found: list[dict[str, float]], name: str) -> dict[str, float]:
        logs = [math.log(f[name] * f["share"]) for f in found]
        return {
            "of ideal, geometric mean": math.exp(statistics.mean(logs)),
            "slowest over dense": min(f[name] for f in found),
        }

    parts = {dtype: [f for n, f in cells.items() if n.endswith(dtype)] for dtype in DTYPES}
    parts = {"all": list(cells.values()), **{dtype: f for dtype, f in parts.items() if f}}
    return {
        name: {part: of(found, name) for part, found in parts.items()}
        for name in ("tensorize", "by hand")
    }


def shape_of(text: str) -> tuple[int, int]:
    m, n = text.split("x")
    return int(m), int(n)


def options_of_grid(parser: argparse.ArgumentParser, batches: Sequence[int], rounds: int) -> None:
    """What benchmarks over this grid have in common."""
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(batches))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--resume", action="store_true", help="go on with the cells that are kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options_of_grid(parser, BATCHES, rounds=7)
    parser.add_argument("--inductor", action="store_true", help="the dense layer compiled, too")
    options = parser.parse_args()
    grid = product(options.dtypes, options.shapes, options.budgets, options.batches)
    cell_by_cell(
        "linear",
        [Cell(shape, batch, budget, dtype) for dtype, shape, budget, batch in grid],
        partial(measure, rounds=options.rounds, inductor=options.inductor),
        summary,
        threads=options.threads,
        resume=options.resume,
    )


if __name__ == "__main__":
    main()
