"""Forecasters of time series: what they are given, and what is left of them."""

from __future__ import annotations

import pytest
import torch

import tensorize
from examples import time_series
from examples.time_series import DAY, FUTURE, PAST, SHAPES, series


def draw(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return series(number, torch.Generator().manual_seed(seed))


def test_series_repeat_by_day_but_for_a_week_a_drift_and_noise() -> None:
    values, hours = draw(200)
    day_later = (values[:, DAY:] - values[:, :-DAY]).square().mean()
    half_later = (values[:, DAY // 2 :] - values[:, : -DAY // 2]).square().mean()
    assert float(day_later) < 0.5 * float(half_later)
    assert bool((hours.diff(dim=1) == 1).all())


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_forecasts_and_gives_its_own_loss(name: str) -> None:
    torch.manual_seed(0)
    shape = SHAPES[name]()
    batch = shape.given(*draw(4))
    with torch.no_grad():
        assert bool(shape.model.eval()(**batch).loss.isfinite())
    assert batch["future_values"].shape[:2] == (4, FUTURE)
    assert len(batch["past_values"][0]) >= PAST


@pytest.mark.slow
def test_a_distribution_without_its_likelihood_is_asked_about() -> None:
    torch.manual_seed(0)
    shape = SHAPES["informer"]()
    data = [shape.given(*draw(8, seed)) for seed in range(4)]
    found = tensorize.analyze(shape.model.eval(), calibration=data, refine=None)
    assert any("parameters of a distribution (StudentT)" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_forecasters_are_learnt_and_compressed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--shape {name} --steps 60 --batch 16 --batches 8 --budgets 0.75 0.25"
    (rows,) = time_series.main(arguments.split()).values()
    dense, large, small = rows
    assert large.parameters <= 0.75 * dense.parameters
    assert small.parameters <= 0.25 * dense.parameters
    assert abs(large.lost) < 0.05
    assert large.own < dense.own + 0.05
    assert abs(large.lost) <= small.lost + 1e-3
    assert "own loss" in capsys.readouterr().out
