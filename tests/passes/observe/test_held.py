"""What an observed run made is gone after it: no activation outlives its batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tests.passes.observe.moments import draw


class Watched(nn.Module):
    """Two layers; what is between them is shown to ``look`` in every run."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.look = nn.Linear(6, 8), nn.Linear(8, 5), look

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.look(hidden)
        return self.second(hidden)


@pytest.mark.parametrize("metric", ["loss", "input"])
def test_no_activation_outlives_its_batch(metric: str) -> None:
    between: list[weakref.ref[Tensor]] = []
    most = 0

    def look(hidden: Tensor) -> None:
        nonlocal most
        most = max(most, sum(seen() is not None for seen in between))
        between.append(weakref.ref(hidden))

    batches = [draw((16, 6), seed).float() for seed in range(6)]
    # In a refit the runs of all batches wait for each other.
    options = {"metric": metric, "refine": None, "progress": False}
    tensorize.analyze(Watched(look).eval(), calibration=batches, **options)
    gc.collect()
    assert len(between) > len(batches)
    assert most <= 2, "at most those of one batch, in the dense and in the small model"
    assert not [seen for seen in between if seen() is not None]
