"""The pre-training example: side by side, killed and resumed, by the Trainer, in narrow formats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples import pretrain_gpt
from tests.paths import ROOT

SMALL = [
    "--width", "32", "--layers", "1", "--heads", "2", "--context", "32", "--batch", "2",
    "--words", "300", "--characters", "20000", "--flops", "0.75",
]  # fmt: skip


def pretrain(out: Path, *options: str) -> dict[str, list[list[dict[str, Any]]]]:
    return pretrain_gpt.main([*SMALL, "--out", str(out), *options])


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log]


def test_dense_and_compressed_side_by_side(tmp_path: Path, capsys: Any) -> None:
    found = pretrain(tmp_path, "--steps", "30", "--every", "10", "--seeds", "0", "1")
    assert list(found) == ["dense", "compressed, same tokens", "compressed, same FLOPs"]
    dense, tokens, flops = (logs[0] for logs in found.values())
    assert len(dense) == len(tokens) == 30 < len(flops)
    assert tokens[-1]["flops"] < 0.85 * dense[-1]["flops"]
    assert flops[-1]["flops"] == pytest.approx(dense[-1]["flops"], rel=0.05)
    for logs in found.values():
        assert losses(logs[0]) != losses(logs[1])  # two seeds
        for log in logs:
            assert log[-1]["loss"] < log[0]["loss"] - 0.25
            marked = [entry["step"] for entry in log if "validation" in entry]
            assert marked == sorted({*range(10, len(log), 10), len(log)})
    said = capsys.readouterr().out
    assert "over dense" in said
    assert (tmp_path / "losses.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--shrink-from", "0.9"], id="ranks", marks=pytest.mark.slow),
        pytest.param(["--precision", "stochastic"], id="stochastic", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path, options: list[str]) -> None:
    options = ["--steps", "24", "--every", "3", *options]
    unbroken = pretrain(tmp_path / "whole", *options)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "examples.pretrain_gpt", *SMALL, "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    folder = out / "compressed-same-tokens-0"
    while not list(folder.glob("step-*/.metadata")):  # then at any moment
        assert process.poll() is None
        assert time.monotonic() - started < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "log.json").exists()
    resumed = pretrain(out, *options)
    for name, logs in unbroken.items():
        assert losses(resumed[name][0]) == losses(logs[0]), name
        assert resumed[name][0][-1]["validation"] == logs[0][-1]["validation"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_the_trainer_of_hugging_face_gives_the_same_losses(tmp_path: Path) -> None:
    options = ["--steps", "12", "--every", "6"]
    plain = pretrain(tmp_path / "plain", *options)
    trainer = pretrain(tmp_path / "trainer", *options, "--through", "trainer")
    for name, logs in plain.items():
        # It rounds what it logs.
        assert losses(trainer[name][0]) == pytest.approx(losses(logs[0]), abs=2e-3), name


@pytest.mark.slow
def test_narrow_precisions_stay_within_the_noise_of_float32(tmp_path: Path) -> None:
    """The noise is what another seed makes of the same run.

    The range of three runs is 1.7 of their standard deviations; two runs are further apart than
    2.3 of them in one case of ten.
    """
    options = ["--steps", "40", "--every", "40", "--learning-rate", "2e-3"]
    seeds = pretrain(tmp_path / "float32", *options, "--seeds", "0", "1", "2")
    for precision in ("mixed", "stochastic"):
        found = pretrain(tmp_path / precision, *options, "--precision", precision)
        for name, (log,) in found.items():
            wide = [one[-1]["validation"] for one in seeds[name]]
            noise = max(wide) - min(wide)
            assert abs(log[-1]["validation"] - wide[0]) < max(1.5 * noise, 0.02), (precision, name)


def test_the_log_says_what_was_run(tmp_path: Path) -> None:
    pretrain(tmp_path, "--steps", "4", "--every", "4", "--nonlinearity", "silu")
    kept = json.loads((tmp_path / "compressed-same-tokens-0" / "log.json").read_text())
    assert kept["run"]["nonlinearity"] == "silu"
    assert [entry["step"] for entry in kept["log"]] == [1, 2, 3, 4]
