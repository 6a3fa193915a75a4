"""The command line writes, compiles and times kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tensorize
from tensorize.cli.telling import CAPTURE, DEFECT, USAGE
from tensorize.store.manifest import read_report
from tests.cli.commands import invoke

# ------------------------------------------------------------------------------------------ compile


def test_kernels_are_written_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ("compile", "clinet:make", "--budget", "0.5", "--out", "small", "--json")
    result = invoke(
        *arguments, "--backend", "triton", "--emit", "kernels", "--target", "hip:gfx90a"
    )
    assert result.exit_code == 0, result.output
    assert read_report("small").backend == "triton"
    told = json.loads(result.stdout)["kernels"]
    assert json.loads(Path("kernels/kernels.json").read_text()) == told
    assert told["up.weight.forward"]["hip:gfx90a"]["spills"] == 0
    assert "@triton.jit" in Path("kernels/up.weight.forward.py").read_text()
    assert Path("kernels/up.weight.forward.hip_gfx90a.hsaco").read_bytes()[:4] == b"\x7fELF"
    assert "amdgcn" in Path("kernels/up.weight.forward.hip_gfx90a.s").read_text()
    for wrong in (("--target", "cuda:90"), ("--emit", "kernels", "--target", "tpu:1")):
        assert invoke(*arguments, *wrong).exit_code == USAGE
    assert invoke(*arguments, "--emit", "kernels/kernels.json").exit_code == USAGE


def test_kernels_that_cannot_be_compiled_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke(
        "compile", "clinet:make", "--out", "small", "--emit", "kernels", "--target", "cuda:90"
    )
    assert result.exit_code == CAPTURE
    assert "unset TRITON_INTERPRET" in result.stderr
    assert not Path("small").exists()


# ----------------------------------------------------------------------------------- real processes


def test_kernels_of_a_saved_model_are_timed_on_a_gpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("calibrate", "--model", tmp_path)
    assert result.exit_code not in (0, DEFECT)
    assert "kernels are timed on a GPU, and this machine has none" in result.output
    assert "way out" in result.output
    result = invoke("calibrate", "--model", tmp_path, "--rows", "1,many")
    assert result.exit_code == USAGE


def test_calibrate_times_the_kernels_of_a_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[object, list[int]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = tensorize.compile(
        torch.nn.Sequential(torch.nn.Linear(24, 24)), 0.5, example_inputs=(torch.randn(2, 24),)
    )
    monkeypatch.setattr(tensorize, "load", lambda directory, device: small)
    monkeypatch.setattr(
        tensorize, "tune_kernels", lambda model, rows: timed.append((model, rows)) or 3
    )
    result = invoke("calibrate", "--model", tmp_path, "--rows", "1,64")
    assert result.exit_code == 0, result.output
    assert timed == [(small, [1, 64])]
    assert "3 kernels won" in result.output
