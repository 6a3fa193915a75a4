"""Which kernel runs is chosen by measurement, kept, and the same each time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorize
from tensorize import TTSpec
from tensorize.codegen.device import autotune, launch, operations
from tensorize.codegen.device.triton_env import interpreting, precision
from tensorize.codegen.triton import tiles
from tensorize.ir.work import Work
from tests.codegen.device.compiled_nets import WORK, compiled
from tests.kernels import holds_under_the_interpreter
from tests.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__)


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, marks="slow")


def test_choices_are_deterministic_and_never_kernels_where_nothing_was_measured() -> None:
    one = autotune.source(WORK, torch.float32, 1, "cpu")
    few = autotune.source(WORK, torch.float32, 3, "cpu")
    many = autotune.source(WORK, torch.float32, 3000, "cpu")
    assert (one.name, few.name, many.name) == ("decode", "decode", "pair")
    assert autotune.source(WORK, torch.float32, 7, "cpu") is few
    assert not autotune.wins(WORK, torch.float32, 3, "cpu")
    assert not autotune.known("cpu")
    with pytest.raises(ValueError, match="on a GPU"):
        autotune.tune(WORK, torch.float32, 1, "cpu")
    with pytest.raises(tensorize.TensorizeError, match="on a GPU"):
        tensorize.tune_kernels(compiled("aten"))


def test_choices_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    autotune.forget()
    cut = tiles.Tiles(rows=16, inner=32, outer=32)
    try:
        choice = autotune.Choice("forward", cut, ratio=0.5)
        autotune.keep(WORK, torch.float32, autotune.bucket(2), "cpu", choice)
        assert autotune.recorded(WORK, torch.float32, 16, "cpu") == choice
        assert autotune.wins(WORK, torch.float32, 9, "cpu")
        assert not autotune.wins(WORK, torch.float32, 17, "cpu")
        assert not autotune.wins(WORK, torch.bfloat16, 9, "cpu")
        assert autotune.source(WORK, torch.float32, 2, "cpu").tiles == cut
        autotune.place("cpu").write_text("damaged")
        autotune.forget()
        assert not autotune.wins(WORK, torch.float32, 9, "cpu")
    finally:
        autotune.forget()


def test_a_choice_holds_for_the_precision_that_it_was_measured_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch is told of TF32 is true of both, the kernel and the library."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    given = torch.float32, 16, "cuda:0"
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    autotune.forget()
    try:
        matmul.fp32_precision = "tf32"
        assert precision(torch.float32, "cuda:0") == "tf32"
        assert precision(torch.bfloat16, "cuda:0") == "ieee"
        assert precision(torch.float32, "cpu") == "ieee"
        autotune.keep(WORK, *given, autotune.Choice("forward", tiles.Tiles(), ratio=0.5))
        assert autotune.wins(WORK, *given)
        matmul.fp32_precision = "ieee"
        assert not autotune.wins(WORK, *given)
    finally:
        matmul.fp32_precision = before
        autotune.forget()


def test_what_won_anywhere_is_an_operation_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself or in a launch with others; what never won is left to the library."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    autotune.forget()
    try:
        won, lost, never = (TTSpec.low_rank(64, 48, rank) for rank in (8, 12, 16))
        for works, ratio in (((won, won), 0.8), ((lost,), 1.1)):
            work = Work(works)
            (choice, *_) = autotune.candidates(work, torch.float32, 9)
            autotune.keep(work, torch.float32, 16, "cpu", replace(choice, ratio=ratio))
        assert autotune.winners("cpu") == {won}
        assert never not in autotune.winners("cpu")
    finally:
        autotune.forget()


def test_a_kernel_that_does_not_fit_gets_fewer_tiles_in_flight() -> None:
    class OutOfResources(Exception):
        """As triton's."""

    asked: list[int] = []

    def launched(room: int, num_stages: int) -> None:
        asked.append(num_stages)
        if num_stages > room:
            raise OutOfResources("shared memory")

    launch.fit(partial(launched, 2), 4, "one")
    launch.fit(partial(launched, 2), 4, "one")  # what fits is known now
    assert asked == [4, 3, 2, 2]
    with pytest.raises(launch.DoesNotFit, match="shared memory"):
        launch.fit(partial(launched, 0), 2, "another")

    def other(num_stages: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch.fit(other, 4, "third")


def test_every_candidate_is_emitted() -> None:
    for rows in (1, 300):
        found = list(autotune.candidates(WORK, torch.bfloat16, rows))
        assert len(set(found)) == len(found) >= 3
        assert all(autotune.emit(WORK, choice).text for choice in found)
    large = Work((TTSpec.low_rank(2048, 2048, 700),))
    assert {choice.family for choice in autotune.candidates(large, torch.bfloat16, 1)} == {"decode"}
    with pytest.raises(operations.NotCovered):
        list(autotune.candidates(large, torch.bfloat16, 100))


@pytest.mark.slow
def test_every_step_of_the_benchmark_runs() -> None:
    """At a tiny size; without a GPU, in triton's interpreter."""
    if interpreting():
        pytest.skip("it is run by the tests that need no interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert "winner" in lines[-3]
    assert [line.split()[:3] for line in lines[-2:]] == [
        ["64x64", "r16", "T1"],
        ["64x64", "r16", "T20"],
    ]


def test_the_benchmark_needs_a_gpu() -> None:
    from benchmarks import gpu

    assert len(list(gpu.grid(gpu.FULL))) == 75
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            gpu.main([])
