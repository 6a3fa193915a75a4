"""Gated layers whose hidden units one weight reads, or something else as well."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32)

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.hidden(x))


class ReadElsewhere(Gated):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.down(hidden) + hidden.sum(-1, keepdim=True)


class Mixed(Gated):
    """Its hidden units are not those of linears, unit by unit."""

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x).softmax(-1)
