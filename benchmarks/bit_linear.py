"""A linear layer in a few bits beside the dense one, over shapes, batches, forms and dtypes.

    python -m benchmarks.bit_linear

What a quantized weight takes, dense or as two factors, with inputs of one digit of eight bits or of
two, and without rounding them, beside the dense layer of its dtype: its time over the dense one's,
the median of interleaved rounds. What the machine was predicted to take stands beside. Results are
kept after every cell.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.linear import DTYPES, shape_of
from benchmarks.record import cell_by_cell
from benchmarks.timing import interleaved
from tensorize.algebra.metric import Metric
from tensorize.codegen.machine import rates
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.machine import matmul_time
from tensorize.ir.precision import FLOAT, INPUTS
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.rewrite.factorize import quantized
from tensorize.weight.install import install

SHAPES = ((768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 16, 256)
FORMS = ("int8", "int4", "low rank int8", "low rank int4")
SHARE = 0.25
"""Of the entries, as two factors."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a weight (m, n), input rows, what it is held as, the dtype."""

    shape: tuple[int, int]
    batch: int
    form: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} B={self.batch} {self.form} {self.dtype}"

    def spec(self, inputs: str) -> QuantizedSpec:
        (m, n), (*ranks, precision) = self.shape, self.form.rsplit(" ", 1)
        rank = max(1, int(SHARE * m * n / (m + n)))
        inner: Spec = TTSpec.low_rank(m, n, rank) if ranks else DenseSpec((m, n))
        return QuantizedSpec(inner, precision, inputs)


def layer(spec: QuantizedSpec, dtype: torch.dtype) -> nn.Module:
    """A layer with a weight of a spec, of random numbers: rounded to the nearest."""
    m, n = spec.shape
    with torch.device("meta"):
        made = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
    cores = tuple(torch.randn(shape) / shape[-1] ** 0.5 for shape in spec.inner.core_shapes)
    held = quantized(spec, cores, (Metric(1.0, None, None),), dtype)
    count = len(spec.core_shapes)
    install(made, ("0.weight",), spec, [*map(nn.Parameter, held[:count]), *held[count:]])
    return made


@torch.no_grad()
def measure(cell: Cell, rounds: int) -> dict[str, float]:
    """Times over the dense layer's, by what inputs are rounded to; and predicted ones."""
    (m, n), dtype, machine = cell.shape, DTYPES[cell.dtype], rates.current()
    torch.manual_seed(0)
    x = torch.randn(cell.batch, n, dtype=dtype)
    specs = {inputs: cell.spec(inputs) for inputs in INPUTS}
    calls: dict[str, nn.Module] = {"dense": nn.Linear(n, m, bias=False, dtype=dtype)}
    calls |= {inputs: layer(spec, dtype) for inputs, spec in specs.items()}
    found = interleaved({name: partial(module, x) for name, module in calls.items()}, rounds)
    own = matmul_time(machine, cell.batch, n, m, cell.dtype)
    result = {"dense µs": 1e6 * found["dense"].wall}
    for inputs, spec in specs.items():
        result[inputs] = found[inputs].over(found["dense"])
        took = format_of(spec).time(spec, "columns", cell.batch, machine, cell.dtype)
        result[f"{inputs}, predicted"] = float(took / own)
    return result


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells that are slower than dense, and the typical ratio, by what inputs are."""
    return {
        inputs: {
            "of dense, geometric mean": statistics.geometric_mean(
                figures[inputs] for figures in cells.values()
            ),
            "slower than dense": [name for name, figures in cells.items() if figures[inputs] > 1],
        }
        for inputs in INPUTS
        if inputs != FLOAT
    }


def grid(options: argparse.Namespace) -> Sequence[Cell]:
    those = product(options.dtypes, options.shapes, options.forms, options.batches)
    return [Cell(shape, batch, form, dtype) for dtype, shape, form, batch in those]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--resume", action="store_true", help="go on with the cells that are kept")
    options = parser.parse_args()
    cell_by_cell(
        "bit_linear",
        grid(options),
        partial(measure, rounds=options.rounds),
        summary,
        threads=options.threads,
        resume=options.resume,
    )


if __name__ == "__main__":
    main()
