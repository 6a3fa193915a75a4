"""What a compressed linear layer costs in eager mode, beside the same thing written by hand.

    python -m benchmarks.linear

768 x 768 at rank 64, one row, float32: two ``nn.Linear`` in a module of their own against what
``tensorize.compile`` makes of one ``nn.Linear``; medians of interleaved rounds.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep
from benchmarks.timing import interleaved

WIDTH, RANK, ROUNDS = 768, 64, 41


class ByHand(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, WIDTH)
    dense = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    small = tensorize.compile(dense, None, ranks={"*": RANK}, example_inputs=(x,), progress=False)
    modules = {"by hand": ByHand(), "tensorize": small[0], "dense": dense[0]}  # type: ignore[index]
    found = interleaved({name: partial(m, x) for name, m in modules.items()}, ROUNDS)
    times = {name: 1e6 * took.wall for name, took in found.items()}
    ratio = found["tensorize"].over(found["by hand"])
    print(", ".join(f"{name} {took:.2f} µs" for name, took in times.items()))
    print(f"tensorize takes {ratio:.3f} of the time by hand")
    print(f"kept in {keep('linear', {'microseconds': times, 'ratio': ratio})}")


if __name__ == "__main__":
    main()
