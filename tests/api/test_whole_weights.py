"""Weights that are used as a whole are factorized only where they must be, and rebuilt."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tests.models import parameters, relative


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, bidirectional=True)
        self.gru = nn.GRU(48, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias)


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 24, 5)), nn.ReLU())


WHOLE = {
    "LSTM and GRU": (Recurrent, (5, 2, 16)),
    "weight norm": (normed, (3, 16, 20)),
    "standardized": (lambda: nn.Sequential(Standardized(16, 24, 5)), (3, 16, 20)),
}
WHOLES = pytest.mark.parametrize(("make", "shape"), WHOLE.values(), ids=WHOLE)


@WHOLES
def test_a_whole_weight_is_factorized_only_where_the_budget_cannot_be_met_otherwise(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = make().eval(), torch.randn(shape)
    small = tensorize.compile(model, 0.4, example_inputs=(x,))
    assert parameters(small) <= 0.4 * parameters(model)
    rebuilt = [s for s in tensorize.report(small).sites if s.format == "low_rank"]
    assert rebuilt
    for site in rebuilt:
        assert "rebuilt from its factors at every call" in site.reason or site.name == "head.weight"
    copies = [small, copy.deepcopy(small)]
    if "parametrizations" not in rebuilt[0].name:  # torch pickles no parametrized module
        copies.append(pickle.loads(pickle.dumps(small)))
    for copied in copies:
        with torch.no_grad():
            assert relative(copied(x), tensorize.densify(copied)(x)) < 1e-5
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    double = small.double()
    with torch.no_grad():
        assert relative(double(x.double()), tensorize.densify(double)(x.double())) < 1e-12


@pytest.mark.parametrize("name", ["weight norm", "standardized"])  # dynamo takes no LSTM
def test_a_whole_weight_is_rebuilt_in_one_graph(name: str) -> None:
    make, shape = WHOLE[name]
    x = torch.randn(shape)
    small = tensorize.compile(make().eval(), 0.4, example_inputs=(x,))
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert relative(compiled(x).detach(), small(x).detach()) < 1e-6


def test_a_whole_weight_stays_dense_where_others_can_be_cut() -> None:
    small = tensorize.compile(Recurrent().eval(), 0.99, example_inputs=(torch.randn(5, 2, 16),))
    formats = {site.name: site.format for site in tensorize.report(small).sites}
    assert formats.pop("head.weight") == "low_rank"
    assert set(formats.values()) == {"dense"}


def test_a_recurrent_layer_holds_no_dense_weight_beside_its_cores() -> None:
    small = tensorize.compile(Recurrent().eval(), 0.4, example_inputs=(torch.randn(5, 2, 16),))
    for module in small.modules():
        lists = [value for value in vars(module).values() if isinstance(value, list)]
        assert not any(isinstance(v, Tensor) for held in lists for v in held)


@WHOLES
def test_the_loss_of_a_whole_weight_is_predicted(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = make().eval()
    plan = tensorize.analyze(model, calibration=[torch.randn(shape) for _ in range(12)]).plan(0.5)
    small, x = tensorize.apply(model, plan), torch.randn(64, *shape)
    with torch.no_grad():
        want, got = (torch.cat([m(part) for part in x]) for m in (model, small))
    rows, error = want.flatten(0, -2), (want - got).square().mean()
    measured = float(error / (rows - rows.mean(0)).square().mean())
    assert plan.predicted.loss == pytest.approx(measured, rel=0.35)
