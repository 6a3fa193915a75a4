"""Grouped q, k, v under the backend against the same model without grouping, side by side.

    python -m benchmarks.group

Width 1024, one token, rank 128, float32, with torch's own number of threads and with one; medians
of interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep
from benchmarks.timing import interleaved

WIDTH, RANK, ROUNDS = 1024, 128, 31


class Projections(nn.Module):
    """The q, k and v of one attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, WIDTH)
    small = tensorize.compile(
        Projections().eval(), None, ranks={"*": RANK}, example_inputs=(x,), progress=False
    )
    ways = {
        "ungrouped, eager": small,
        "ungrouped, compiled": torch.compile(small, backend="eager"),
        "grouped, compiled": torch.compile(small, backend="tensorize"),
    }
    results = [measure(ways, x, threads) for threads in sorted({torch.get_num_threads(), 1})]
    print(f"kept in {keep('group', {'runs': results})}")


def measure(
    ways: Mapping[str, Callable[[Tensor], object]], x: Tensor, threads: int
) -> dict[str, Any]:
    """Times of all ways in turn, and how much faster grouped is than each other one."""
    torch.set_num_threads(threads)
    found = interleaved({name: partial(call, x) for name, call in ways.items()}, ROUNDS)
    times = {name: 1e6 * took.wall for name, took in found.items()}
    *others, last = ways
    ratios = {name: found[name].over(found[last]) for name in others}
    print(f"threads: {threads}")
    for name, took in times.items():
        print(f"  {name:<20} {took:6.1f} µs")
    for name, ratio in ratios.items():
        print(f"  grouped is {ratio:.2f}x as fast as {name}")
    return {"threads": threads, "microseconds": times, "speedup": ratios}


if __name__ == "__main__":
    main()
