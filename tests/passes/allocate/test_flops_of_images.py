"""FLOPs of an image: what torch counts for the dense model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensorize


class Net(nn.Module):
    """Strides, groups and pooling: every weight has rows of its own number."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.strided = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.grouped(self.strided(self.wide(x).relu()).relu())
        return self.head(features.mean((2, 3)))


def test_before_and_after_are_what_torch_counts() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(4, 3, 16, 16) for _ in range(4)]
    small = tensorize.compile(model, 0.6, calibration=batches)
    report = tensorize.report(small)
    assert report.factorized
    counted = []
    for each in (model, small):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            each(batches[0])
        counted.append(flops.get_total_flops() // 4)
    assert report.totals.image is not None
    assert list(report.totals.image) == counted
    assert "FLOPs an image" in str(report)
