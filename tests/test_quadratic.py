"""The full quadratic of a weight's error, against the rise of the loss where that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.ir import TTSpec
from tensorize.passes import quadratic
from tensorize.passes.spectra import Spectrum
from tests.models import CASES


class Pooled(nn.Module):
    """A linear layer over the rows of a sequence, then their mean: rows pull the same way."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.layer, self.pooled = nn.Linear(12, 12), pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.mean(1) if self.pooled else y


def batches(count: int = 8, *, common: float = 3.0) -> list[Tensor]:
    """Sequences whose rows have most of their size in common."""
    found = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        shared = common * torch.randn(16, 1, 12, generator=generator)
        found.append(shared + torch.randn(16, 10, 12, generator=generator))
    return found


def analysed(model: nn.Module, data: list[Any]) -> tensorize.Analysis:
    return tensorize.analyze(model, calibration=data, refine=None)


def rise(model: Pooled, rank: int, curve: Spectrum, data: list[Tensor]) -> float:
    """The squared error of the outputs over their variance, with the weight cut to a rank."""
    weight = model.layer.weight.detach()
    left, right = curve.factors(TTSpec.low_rank(12, 12, rank), weight)
    x = torch.cat(data).double()
    with torch.no_grad():
        off = x @ (left @ right - weight).double().T
        off = off.mean(1) if model.pooled else off.flatten(0, 1)
        outputs = torch.cat([model(batch) for batch in data]).double().reshape(-1, 12)
    variance = (outputs - outputs.mean(0)).square().sum(1).mean()
    return float(off.square().sum(1).mean() / variance)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_cost_is_the_rise_of_the_loss(pooled: bool) -> None:
    torch.manual_seed(0)
    model, data = Pooled(pooled=pooled), batches()
    curve = analysed(model, data).program.spectra["layer.weight"]
    rank = max(1, int(quadratic.LEVELS[0] * 6))
    want = rise(model, rank, curve, data)
    said = float(curve.distortion[rank])
    cost = float(curve.cost(said))
    assert cost == pytest.approx(want, rel=0.4)
    assert abs(np.log(cost / want)) < abs(np.log(said / want)) or not pooled


def test_where_the_metric_is_right_it_changes_little() -> None:
    torch.manual_seed(0)
    curve = analysed(Pooled(pooled=False), batches(16, common=0.0)).program.spectra["layer.weight"]
    ((lost, cost),) = curve.knots
    assert cost == pytest.approx(lost, rel=0.25)


def test_few_samples_say_little() -> None:
    torch.manual_seed(0)
    model = Pooled(pooled=True)
    few, many = (analysed(model, batches(n)).program.spectra["layer.weight"] for n in (2, 12))
    far = [abs(np.log(cost / lost)) for curve in (few, many) for lost, cost in curve.knots]
    assert far[0] < far[1]


def test_costs_grow_with_the_distortion_and_are_0_at_none() -> None:
    model = CASES["llama"].model()
    analysis = analysed(model, [CASES["llama"].batch(k) for k in range(8)])
    for curve in analysis.program.spectra.values():
        costs = curve.cost(curve.distortion.numpy())
        assert costs[-1] == 0
        assert (np.diff(costs) <= 0).all()
        assert curve.cost(0.0) == 0


def test_plans_add_up_costs() -> None:
    model = CASES["gpt"].model()
    analysis = analysed(model, [CASES["gpt"].batch(k) for k in range(8)])
    plan = analysis.plan(0.6)
    for site in plan.sites:
        if site.spec is not None and site.shared is None:
            curve = analysis.program.spectra[site.name]
            assert site.predicted_loss == pytest.approx(
                float(curve.cost(curve.distortion_of(site.spec))), rel=1e-6
            )


def test_the_model_and_its_gradients_are_as_they_were() -> None:
    case = CASES["bert"]
    model = case.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    analysed(model, [case.batch(k) for k in range(4)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["mixtral", "t5", "vit"])
def test_weights_that_it_does_not_reach_are_left_to_the_metric(name: str) -> None:
    case = CASES[name]
    analysis = analysed(case.model(), [case.batch(k) for k in range(4)])
    for site in analysis.program.sites:
        curve = analysis.program.spectra.get(site.name)
        if curve is not None and (site.experts or site.last_resort):
            assert curve.knots == ()
            assert np.array_equal(curve.cost(curve.distortion.numpy()), curve.distortion.numpy())


def test_models_in_half_precision_are_measured_too() -> None:
    case = CASES["gpt"]
    data = [case.batch(k) for k in range(4)]
    curves = [
        analysed(case.model().to(dtype), data).program.spectra
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for name, curve in curves[0].items():
        ((lost, cost),) = curve.knots
        ((lost_half, cost_half),) = curves[1][name].knots
        assert cost_half / lost_half == pytest.approx(cost / lost, rel=0.5)


def test_other_metrics_have_none() -> None:
    model, data = Pooled(pooled=True), batches(4)
    analysis = tensorize.analyze(model, calibration=data, metric="input")
    assert all(curve.knots == () for curve in analysis.program.spectra.values())
