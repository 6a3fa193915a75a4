"""What a compressed linear layer costs in eager mode, beside the same thing written by hand.

    python -m benchmarks.linear

768 x 768 at rank 64, one row, float32: two ``nn.Linear`` in a module of their own against what
``tensorize.compile`` makes of one ``nn.Linear``; medians of interleaved rounds.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep

WIDTH, RANK, ROUNDS, CALLS = 768, 64, 41, 500


class ByHand(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def microseconds(module: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return 1e6 * (time.perf_counter() - start) / CALLS


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, WIDTH)
    dense = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    small = tensorize.compile(dense, None, ranks={"*": RANK}, example_inputs=(x,), progress=False)
    modules = {"by hand": ByHand(), "tensorize": small[0], "dense": dense[0]}  # type: ignore[index]
    rounds = [{name: microseconds(m, x) for name, m in modules.items()} for _ in range(ROUNDS)]
    times = {name: statistics.median(r[name] for r in rounds) for name in modules}
    ratio = statistics.median(r["tensorize"] / r["by hand"] for r in rounds)
    print(", ".join(f"{name} {took:.2f} µs" for name, took in times.items()))
    print(f"tensorize takes {ratio:.3f} of the time by hand")
    print(f"kept in {keep('linear', {'microseconds': times, 'ratio': ratio})}")


if __name__ == "__main__":
    main()
