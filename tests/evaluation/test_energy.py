"""Energy is what counters say, and nothing where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tensorize
from tensorize.evaluation import energy
from tensorize.evaluation.energy import joules_of, meter


def counter(root: Path, name: str, microjoules: int, wraps: int = 10_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text(f"{wraps}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def using(file: Path, amount: int, wraps: int = 10_000_000) -> None:
    file.write_text(str((int(file.read_text()) + amount) % wraps))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_SHORTEST", 0.01)


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    packages = [counter(tmp_path, f"intel-rapl:{k}", 5_000_000 * k) for k in range(2)]
    part = counter(tmp_path, "intel-rapl:0:0", 0)

    def call() -> None:
        for file in (*packages, part):
            using(file, 1_500)

    assert joules_of(call, "cpu", tmp_path) == pytest.approx(2 * 1.5e-3)


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 9_999_000)
    assert joules_of(lambda: using(file, 4_000), "cpu", tmp_path) == pytest.approx(4e-3)


def test_without_counters_nothing_is_told(tmp_path: Path) -> None:
    def call() -> None:
        raise AssertionError("it runs for nothing")

    assert joules_of(call, "cpu", tmp_path) is None


def test_a_meter_tells_what_was_used_since_it_was_made(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 9_000_000)
    found = meter("cpu", tmp_path)
    assert found is not None
    using(file, 2_000_000)
    assert found.read() == pytest.approx(2.0)
    using(file, 500_000)
    assert found.read() == pytest.approx(2.5)
    assert meter("cpu", tmp_path / "elsewhere") is None


def test_an_evaluation_tells_joules_a_row_or_has_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval()
    small = tensorize.compile(dense, 0.8, metric="frobenius", progress=False)
    batches = [torch.randn(10, 8)]
    monkeypatch.setattr("tensorize.evaluation.speed.joules_of", lambda call, device: None)
    untold = tensorize.evaluate(small, dense, batches, progress=False)
    assert untold.models[0].joules is None
    assert "J/sample" in str(untold)
    monkeypatch.setattr("tensorize.evaluation.speed.joules_of", lambda call, device: 20.0)
    told = tensorize.evaluate(small, dense, batches, progress=False)
    assert (told.dense.joules, told.models[0].joules) == (2.0, 2.0)
    assert "J/sample" not in str(
        tensorize.evaluate(small, dense, batches, time=False, progress=False)
    )
