"""Experts and convolutions of low rank with and without an identity in the second factor: time.

    python -m benchmarks.pivot_uses --threads 1

At the same rank and at the same number of parameters, half of the dense ones, over the plain form
(above 1: faster); interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from benchmarks.timing import interleaved
from tensorize.ir.spec import TTSpec
from tensorize.weight.forms import to_pivoted
from tensorize.weight.install import install

EXPERTS, SIZE = 8, 1024
CONVOLUTIONS = ((64, 64, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7), (256, 1024, 1, 14))


class Stack(nn.Module):
    """Experts, and what is done with them."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.empty(EXPERTS, SIZE, SIZE)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def loop(x: Tensor, weight: Tensor) -> Tensor:
    parts = x.chunk(EXPERTS)
    return torch.cat([F.linear(part, weight[e]) for e, part in enumerate(parts)])


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    ends = torch.arange(1, EXPERTS + 1) * (len(x) // EXPERTS)
    return F.grouped_mm(x, weight.mT, offs=ends.int())


def batched(x: Tensor, weight: Tensor) -> Tensor:
    experts = torch.arange(len(x)) % EXPERTS
    return torch.bmm(weight[experts], x.unsqueeze(-1))


def timed(make: Callable[[], nn.Module], x: Tensor) -> dict[str, float]:
    """How many times as fast as the plain form the pivoted is."""
    shape = make().get_parameter("weight").shape
    experts, m, n = shape if len(shape) == 3 else (0, shape[0], shape[1:].numel())
    rank = m * n // (2 * (m + n)) // 8 * 8
    more = next(r for r in range(min(m, n), 0, -8) if r * (m + n - r) <= rank * (m + n))
    models = {}
    for name, r in (("plain", rank), ("rank", rank), ("parameters", more)):
        model = nn.Sequential(make())
        spec = TTSpec.low_rank(m, n, r, experts=experts)
        cores = [nn.Parameter(torch.randn(shape)) for shape in spec.core_shapes]
        install(model, ["0.weight"], spec, cores)
        assert name == "plain" or to_pivoted(model)
        models[name] = partial(model.to(x.dtype), x)
    with torch.no_grad():
        times = interleaved(models)
    return {name: times["plain"].over(times[name]) for name in ("rank", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}

    def measure(name: str, make: Callable[[], nn.Module], x: Tensor) -> None:
        results[name] = timed(make, x)
        print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for use in (loop, grouped, batched):
            for rows in (8, 128, 1024) if use is not batched else (8, 16):
                x = torch.randn(rows, SIZE, dtype=dtype)
                measure(f"{use.__name__}, {rows} rows, {kind}", partial(Stack, use), x)
    for into, out, kernel, side in CONVOLUTIONS:
        make = partial(nn.Conv2d, into, out, kernel, padding=kernel // 2)
        name = f"convolution {out} x {into} x {kernel} x {kernel} of {side} x {side}"
        measure(name, make, torch.randn(1, into, side, side))
    print("written", keep("pivot_uses", results))


if __name__ == "__main__":
    main()
