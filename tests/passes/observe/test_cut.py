"""Large calibration batches are cut, so that a backward pass keeps little of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.passes.observe import parts
from tests.models import CASES
from tests.passes.observe.moments import collect, same


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """Two layers, which samples may share something between."""

    def __init__(self, how: str = "each") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "eight" and len(x) != 8:
            raise ValueError("made for eight samples")
        if self.how == "axis 1":
            x = x.transpose(0, 1)
        y = self.b(torch.tanh(self.a(x)))
        return y - y.mean(0) if self.how == "among" else y


def calibration(model: nn.Module, batches: list[Any], **options: Any) -> list[Tensor]:
    analysis = tensorize.analyze(model, calibration=batches, refine=None, **options)
    return [batch.args[0] for batch in analysis.calibration]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 8 samples x 5 rows, so many bytes as 3 samples need.
    monkeypatch.setattr(parts, "_KEPT_BYTES", 3 * 5 * 4 * (24 + 32 + 32 + 24))


def test_they_become_runs_of_samples_in_their_order() -> None:
    batches = [draw((8, 5, 24), seed) for seed in range(2)]
    cut = calibration(Layers(), batches)
    assert [len(part) for part in cut] == [3, 3, 2, 3, 3, 2]
    assert torch.equal(torch.cat(cut), torch.cat(batches))


def test_smaller_ones_stay_and_larger_ones_are_cut_to_fit() -> None:
    cut = calibration(Layers(), [draw((3, 5, 24), 0), draw((4, 10, 24), 1), draw((2, 5, 24), 2)])
    assert [tuple(part.shape[:2]) for part in cut] == [(3, 5), *[(1, 10)] * 4, (2, 5)]


@pytest.mark.parametrize("how", ["among", "axis 1", "eight"])
def test_they_stay_where_samples_are_not_apart(how: str) -> None:
    assert len(calibration(Layers(how), [draw((8, 5, 24), 0), draw((8, 5, 24), 1)])) == 2


def test_they_stay_where_the_callers_loss_may_read_them_together() -> None:
    batches = [draw((8, 5, 24), seed) for seed in range(2)]
    loss = {"loss_fn": lambda outputs, batch: outputs.square().mean()}
    assert len(calibration(Layers(), batches, **loss)) == 2


def test_one_sample_is_not_cut() -> None:
    assert len(calibration(Layers(), [draw((1, 50, 24), seed) for seed in range(2)])) == 2


def test_keywords_are_cut_with_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bert"]
    monkeypatch.setattr(parts, "_KEPT_BYTES", 1)
    whole = [case.batch(seed) for seed in range(2)]
    analysis = tensorize.analyze(case.model(), calibration=whole, refine=None)
    for name, tensor in whole[0].items():
        found = [batch.kwargs[name] for batch in analysis.calibration[: len(tensor)]]
        assert torch.equal(torch.cat(found), tensor)


def test_what_is_learnt_is_the_same() -> None:
    """Moments are sums over rows, whichever batch they come in."""
    model, batches = Layers(), [draw((8, 5, 24), seed) for seed in range(2)]
    cut = calibration(model, batches)
    same(collect(model, batches, "input"), collect(model, cut, "input"), torch.float32)
