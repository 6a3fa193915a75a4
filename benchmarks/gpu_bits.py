"""Weights in codes on a GPU: kernels that read them, beside the dense weight and numbers made anew.

    python -m benchmarks.gpu_bits            # one GPU, about two minutes
    python -m benchmarks.gpu_bits --smoke    # every step at a tiny size, without a GPU interpreted

By the clock and on the roof of ``benchmarks/gpu.py``: bfloat16, CUDA graphs, operands that rotate
through more memory than the cache holds, every result checked against the float64 product of the
same numbers. Ideal reads the codes at the measured copy rate, or multiplies at the matmul rate.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, DTYPE, Clock, Roof, check, copies, dense_layer, draw, exact, roof
from benchmarks.record import keep
from tensorize.algebra.metric import Metric
from tensorize.codegen.device import operations
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.precision import FLOAT
from tensorize.weight import products

SHAPES, TOKENS, WIDE = ((4096, 4096), (11008, 4096)), (1, 16, 256, 4096), 8192
SMALL = (((48, 80),), (1, 20), 128)
PRECISIONS = ("int8", "int4", "int3", "int2")
PLAIN = Metric(1.0, None, None)


def measure(
    shape: tuple[int, int], precision: str, tokens: int, clock: Clock, ceiling: Roof
) -> dict[str, float]:
    """Microseconds of one product, and what the ideal of codes is of the kernel's."""
    m, n = shape
    spec = QuantizedSpec(DenseSpec(shape), precision, FLOAT)
    kernel = operations.contractions(spec)["columns"]
    xs = [draw(tokens, n) for _ in range(4)]
    weights = [draw(m, n) for _ in range(min(copies(2 * m * n), 8))]
    one = format_of(spec).rounded(spec, (weights[0].float(),), (PLAIN,), DTYPE)
    held = [tuple(t.clone() for t in one) for _ in range(min(copies(spec.bytes(2)), 32))]
    numbers = format_of(spec).reconstruct(spec, one)

    def anew(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return products.matmul(spec, {}, cores, x, "columns")

    error = check(kernel(xs[0], one), exact(xs[0], numbers))
    found = {
        "dense": clock.graph([partial(dense_layer, xs[k % 4], w) for k, w in enumerate(weights)]),
        "numbers made anew": clock.graph([partial(anew, xs[k % 4], c) for k, c in enumerate(held)]),
        "kernel": clock.graph([partial(kernel, xs[k % 4], c) for k, c in enumerate(held)]),
    }
    nbytes = spec.bytes(2) + 2 * tokens * (m + n)
    ideal = ceiling.ideal(2 * tokens * m * n, nbytes)
    return {**found, "of ideal": ideal / found["kernel"], "error": error}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="every step at a tiny size; no file")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu":
        if not options.smoke:
            raise SystemExit("no GPU on this machine; --smoke runs every step at a tiny size")
        os.environ["TRITON_INTERPRET"] = "1"
    shapes, tokens, wide = SMALL if options.smoke else (SHAPES, TOKENS, WIDE)
    torch.manual_seed(0)
    clock = Clock(1 if options.smoke else options.rounds)
    ceiling = roof(clock, wide)
    cells: dict[str, Any] = {}
    for shape, precision, rows in product(shapes, PRECISIONS, tokens):
        name = f"{shape[0]}x{shape[1]} {precision} T{rows}"
        cells[name] = measure(shape, precision, rows, clock, ceiling)
        print(name, ", ".join(f"{key} {value:.3g}" for key, value in cells[name].items()))
        if not options.smoke:
            keep("gpu_bits", {"roof": vars(ceiling), "cells": cells})


if __name__ == "__main__":
    main()
