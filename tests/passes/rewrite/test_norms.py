"""Statistics of batch norms are estimated again where that lowers what is lost."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

import tensorize
from tensorize.ir.machine import Machine
from tests.marks import slow


class Net(nn.Module):
    """Convolutions and norms, trained to tell shifted patterns apart."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 24), (24, 32), (32, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> ImageClassifierOutput:
        logits = self.head(self.layers(x).mean((2, 3)))
        return ImageClassifierOutput(logits=logits)  # type: ignore[arg-type]


def images(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    patterns = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(6, (count,), generator=draw)
    shift = torch.randint(-1, 2, (count, 2), generator=draw).tolist()
    moved = [torch.roll(patterns[c], s, (1, 2)) for c, s in zip(classes, shift, strict=True)]
    return torch.stack(moved) + torch.randn(count, 3, 8, 8, generator=draw), classes


@cache
def _trained() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, draw = Net().train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        x, classes = images(64, draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x).logits, classes).backward()
        optimizer.step()
    return model.eval(), [images(64, draw)[0] for _ in range(8)]


def trained() -> tuple[Any, list[Tensor]]:
    model, data = _trained()
    return copy.deepcopy(model), data


def distance(small: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(small(x).logits.log_softmax(-1), dense(x).logits.log_softmax(-1)) for x in data]
        return sum(float((b.exp() * (b - a)).sum()) for a, b in pairs)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def test_they_are_estimated_again_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # Low rank with all of its factors, which loses enough that statistics are worth it.
    monkeypatch.setattr(Machine, "reads_orders", False)
    model, data = trained()
    before = statistics(model)
    small = tensorize.compile(model, 0.3, calibration=data, metric="frobenius", refine="refit")
    assert any("batch norms" in note for note in tensorize.report(small).notes)
    assert all(torch.equal(b, before[name]) for name, b in statistics(model).items())
    found = statistics(small)
    assert any(not torch.equal(found[name], before[name]) for name in before)
    fresh = [images(64, torch.Generator().manual_seed(2))[0] for _ in range(4)]
    ours = distance(small, model, fresh)
    for name, buffer in small.named_buffers():
        if name in before:
            buffer.copy_(before[name])
    assert ours < distance(small, model, fresh)
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(m.momentum, m.training) for m in norms] == [(0.1, False)] * 4
    assert [int(m.num_batches_tracked) for m in norms] == [60] * 4


@pytest.mark.parametrize(
    "options",
    [{"refine": None}, slow({"refine": "refit", "budget": 0.5})],
    ids=["unasked", "worse"],
)
def test_they_stay_where_nobody_asked_or_it_gains_nothing(options: dict[str, Any]) -> None:
    model, data = trained()
    before = statistics(model)
    small = tensorize.compile(model, calibration=data, **{"budget": 0.2, **options})
    found = statistics(small)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert not any("batch norms" in note for note in tensorize.report(small).notes)


def test_norms_that_keep_nothing_or_are_not_called_are_no_obstacle() -> None:
    model, data = trained()
    model.layers[4] = nn.BatchNorm2d(24, track_running_stats=False)
    model.unused = nn.BatchNorm1d(4)
    small = tensorize.compile(model.eval(), 0.3, calibration=data, refine="refit")
    assert float(small.unused.running_var.sum()) == 4.0
    with torch.no_grad():
        assert torch.isfinite(small(data[0]).logits).all()
