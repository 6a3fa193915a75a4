"""Weather on a plane: what the solver keeps, how the model reads it, when a forecast holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import weather
from examples.weather import BANDS, Forecaster, Row, Solver


def random_states(seed: int = 0, number: int = 2) -> Tensor:
    return Solver(32).balanced(number, torch.Generator().manual_seed(seed))


def columns(side: int) -> Tensor:
    """Places along a row, as angles."""
    return 2 * math.pi / side * torch.arange(side, dtype=torch.float64)


# ------------------------------------------------------------------------------------- the solver


def test_water_is_neither_made_nor_lost_and_energy_does_not_grow() -> None:
    solver, states = Solver(32), random_states()
    later = solver.advance(states)

    def energy(x: Tensor) -> Tensor:
        depth = weather.DEPTH + x[:, 2]
        kinetic = depth * x[:, :2].square().sum(1) / 2
        return (kinetic + weather.GRAVITY * x[:, 2].square() / 2).double().sum((1, 2))

    torch.testing.assert_close(
        later[:, 2].mean((1, 2)), states[:, 2].mean((1, 2)), atol=1e-4, rtol=0
    )
    ratio = energy(later) / energy(states)
    assert bool((ratio < 1).all())
    assert bool((ratio > 0.95).all())
    assert float((later - states).norm() / states.norm()) > 0.1  # it is no small step


def test_a_balanced_jet_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """u(y) with f u = -g ∂h/∂y is an exact solution, whatever its strength."""
    monkeypatch.setattr(weather, "DAMPING", 0.0)
    y = columns(32)[:, None].expand(32, 32)
    wave = 2 * math.pi / weather.LENGTH
    height = 10 * torch.cos(2 * y)
    u = weather.GRAVITY / weather.ROTATION * 10 * 2 * wave * torch.sin(2 * y)
    jet = torch.stack([u, torch.zeros_like(u), height])[None]
    torch.testing.assert_close(Solver(32).advance(jet), jet, atol=1e-3 * float(u.max()), rtol=0)


def test_small_waves_run_at_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wave of frequency ω² = f² + g H k² (Poincaré's) is back after a whole period."""
    monkeypatch.setattr(weather, "DAMPING", 0.0)
    number, rise = 2, 0.01
    k = 2 * math.pi / weather.LENGTH * number
    omega = math.sqrt(weather.ROTATION**2 + weather.GRAVITY * weather.DEPTH * k**2)
    monkeypatch.setattr(weather, "INTERVAL", 2 * math.pi / omega)
    monkeypatch.setattr(weather, "STEPS", 60)
    x = (number * columns(32))[None, :].expand(32, 32)
    u = rise / weather.DEPTH * omega / k * x.cos()
    v = rise / weather.DEPTH * weather.ROTATION / k * x.sin()
    wave = torch.stack([u, v, rise * x.cos()])[None]
    solver = Solver(32)
    torch.testing.assert_close(solver.advance(wave), wave, atol=1e-3 * rise, rtol=0)
    monkeypatch.setattr(weather, "INTERVAL", math.pi / omega)
    torch.testing.assert_close(solver.advance(wave), -wave, atol=1e-3 * rise, rtol=0)


def test_the_solver_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the step, a sixteenth of the error: Runge-Kutta of fourth order."""
    solver, states, results = Solver(32), random_states().double(), []
    for steps in (8, 16, 96):
        monkeypatch.setattr(weather, "STEPS", steps)
        results.append(solver.advance(states))
    coarse, fine = ((result - results[-1]).norm() for result in results[:2])
    assert 10 < float(coarse / fine) < 24


@pytest.mark.parametrize("number", [1, 3, 16])
def test_energy_stands_at_the_wave_number_of_a_wave(number: int) -> None:
    solver = Solver(32)
    state = torch.zeros(2, 3, 32, 32)
    state[:, 0] = 3 * (number * columns(32)).cos()
    found = solver.energy(state)
    assert float(found[number] / found.sum()) == pytest.approx(1)
    assert float(found.sum()) == pytest.approx(float(state[:, :2].square().sum(1).mean()) / 2)


# -------------------------------------------------------------------------------------- the model


def test_patches_come_back_where_they_were() -> None:
    x = torch.randn(2, 8, 8, 3)
    assert torch.equal(weather._split(weather._merged(x)), x)
    block = weather.Block(16, side=8, window=4, shift=2)
    with torch.no_grad():  # attention that gives every patch the mean of its window
        block.query_key_value.weight.zero_()
        block.query_key_value.bias.zero_()
        block.query_key_value.weight[32:].copy_(torch.eye(16))
        block.out.weight.copy_(torch.eye(16))
        block.out.bias.zero_()
    x = torch.randn(1, 8, 8, 16)
    means = x.roll((-2, -2), (1, 2)).unflatten(2, (2, 4)).unflatten(1, (2, 4)).mean((2, 4))
    means = means.repeat_interleave(4, 1).repeat_interleave(4, 2).roll((2, 2), (1, 2))
    block.place.data.zero_()
    torch.testing.assert_close(block._attended(x), means)


def test_a_shift_of_the_plane_shifts_the_change() -> None:
    """By a window of fine patches no place is preferred but within the coarse attention."""
    torch.manual_seed(0)
    model = Forecaster(16, 16, 0)
    state = torch.randn(1, 3, 16, 16)
    moved = model(state.roll((8, 8), (2, 3)))
    torch.testing.assert_close(moved, model(state).roll((8, 8), (2, 3)))


# ---------------------------------------------------------------------------------------- the run


def row(budget: float | None, parameters: int, error: float, *bands: float) -> Row:
    return Row(budget, parameters, (error, error), dict(zip(BANDS, bands, strict=True)))


def test_a_forecast_without_its_small_waves_does_not_hold() -> None:
    dense = row(None, 100, 1.0, 1.0, 0.9, 0.8)
    same, smeared, wrong = (
        row(0.75, 75, 1.05, 1.0, 0.9, 0.75),
        row(0.5, 50, 1.05, 1.0, 0.9, 0.5),
        row(0.25, 25, 1.5, 1.0, 0.9, 0.8),
    )
    held = [each.holds(dense, 1.1, 0.1) for each in (dense, same, smeared, wrong)]
    assert held == [True, True, False, False]
    assert weather.chosen([dense, same, smeared, wrong], 1.1, 0.1) is same
    assert weather.chosen([dense, smeared, wrong], 1.1, 0.1) is dense
    assert smeared.holds(dense, 1.1, 0.5)


@pytest.mark.slow
def test_weather_is_learnt_compressed_and_forecast(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = "--side 16 --width 32 --layers 2 --steps 400 --trajectories 48 --times 4"
    page = tmp_path / "weather.html"
    rows, persistence = weather.main(
        [*arguments.split(), "--budgets", "0.9", "0.75", "0.15", "--html", str(page)]
    )
    for words in ("wind off at 6 h, m/s", "energy 500 to 1,100 km", "Latency", "90.0 % kept"):
        assert words in page.read_text()
    dense, large, _, small = rows
    assert dense.mean < 0.7 * sum(persistence) / len(persistence)  # it has learned to forecast
    assert len(dense.bands) == 2  # of the smallest there are no waves
    assert large.parameters <= 0.9 * dense.parameters
    assert large.holds(dense, 1.1, 0.1)
    assert not small.holds(dense, 1.1, 0.1)
    for each in rows[1:3]:
        low, high = each.predicted
        assert low <= each.step <= high
    best = weather.chosen(rows, 1.1, 0.1)
    assert best is not dense
    assert f"{best.parameters / dense.parameters:.1%}".rstrip("%") in capsys.readouterr().out
