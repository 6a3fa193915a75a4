"""A small model compiled for kernels, and a piece of work for them."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.ir.machine import Machine
from tensorize.ir.work import Epilogue, Work

RANKS = {"table.weight": "full", "up.weight": 8, "down.weight": "full", "out.weight": 4}
FORMATS = {"table.weight": "tt", "down.weight": "tt", "*": "low_rank"}


class Net(nn.Module):
    """A table, and linears of low rank and as trains, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.up = nn.Linear(24, 30)
        self.down = nn.Linear(30, 24, bias=False)
        self.out = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.out(x + self.down(torch.relu(self.up(x))))


IDS = torch.arange(6).reshape(2, 3)


def compiled(backend: str, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    with mock.patch.object(Machine, "reads_orders", False):  # as for a GPU, whose kernels do not
        return tensorize.compile(
            model or Net(),
            None,
            example_inputs=(IDS,),
            formats=FORMATS,
            ranks=RANKS,
            backend=backend,
        )


WORK = Work((TTSpec.low_rank(64, 64, 8),), epilogue=Epilogue(bias=True))
