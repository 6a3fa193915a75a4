"""A checkpoint compressed a weight at a time, killed and gone on with: the same bits."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorize
from tensorize.api import write_factors
from tensorize.base.errors import CheckpointError
from tensorize.store import transformers_config
from tensorize.store.manifest import MANIFEST
from tests.api.checkpoints import assert_same, compiled, kill, llama, saved

pytestmark = pytest.mark.usefixtures("a_short_curve")


WORK = ".tensorize-stream"


class Stopped(Exception):
    """A run that ends in the middle: what it leaves is what a killed one leaves."""


def stop(stage: str, count: int, dense: Path, out: Path) -> None:
    def watch(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, count):
            raise Stopped

    with pytest.raises(Stopped):
        tensorize.compile_checkpoint(dense, out, 0.5, progress=watch)


SCRIPT = """
import os, signal, sys
import tensorize
stage, count, dense, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
def watch(now, done, total):
    if now == stage and done == count:
        os.kill(os.getpid(), signal.SIGKILL)
tensorize.compile_checkpoint(dense, out, 0.5, progress=watch)
"""


def test_a_run_killed_twice_goes_on_after_the_last_weight(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for stage, count in (("spectra", 5), ("factorize", 6)):
        kill(SCRIPT, stage, count, checkpoint, out)
        assert not (out / MANIFEST).exists()
    report = tensorize.compile_checkpoint(checkpoint, out, 0.5)
    spectra = next(stage for stage in report.history if stage.name == "spectra")
    assert "16 were kept by an earlier run" in spectra.summary
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))
    assert not (out / WORK).exists()


@pytest.mark.parametrize(
    ("stage", "count", "kept"), [("reading", 3, 0), ("spectra", 5, 5), ("shared factors", 2, 16)]
)
def test_what_is_finished_is_not_made_again(
    stage: str, count: int, kept: int, checkpoint: Path, tmp_path: Path
) -> None:
    stop(stage, count, checkpoint, tmp_path / "stopped")
    told: list[tuple[str, int]] = []
    tensorize.compile_checkpoint(
        checkpoint,
        tmp_path / "stopped",
        0.5,
        progress=lambda stage, done, total: told.append((stage, done)),
    )
    assert next(done for stage, done in told if stage == "spectra") == kept
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


def test_a_run_stopped_while_it_writes_goes_on_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop("factorize", 6, checkpoint, tmp_path / "stopped")
    (journal,) = (tmp_path / "stopped" / WORK).glob("*.jsonl")
    written = {name for line in journal.read_text().splitlines() for name in json.loads(line)}
    assert len(written) >= 6
    with open(journal, "a") as file:
        file.write('{"model.lay')  # a line that was cut off counts in nothing
    made: list[str] = []
    plain = write_factors.replace_weight

    def replace_weight(model: Any, site: Any, *rest: Any) -> float:
        made.append(site.name)
        return plain(model, site, *rest)

    monkeypatch.setattr(write_factors, "replace_weight", replace_weight)
    tensorize.compile_checkpoint(checkpoint, tmp_path / "stopped", 0.5)
    assert made
    assert not written & set(made)
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


@pytest.mark.parametrize("where", ["the configurations", "clearing up", "a file taken away"])
def test_a_run_that_ends_after_the_last_weight_is_made_whole_by_the_next(
    where: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in its place by then, and what was said of the draft holds of none."""
    out = tmp_path / "stopped"
    if where == "a file taken away":
        stop("factorize", 6, checkpoint, out)
        (draft,) = (out / WORK).glob("*.tmp")
        draft.unlink()
    else:
        place = {
            "the configurations": (transformers_config, "save_configs"),
            "clearing up": (shutil, "rmtree"),
        }[where]

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left on device")

        with monkeypatch.context() as patch, contextlib.suppress(CheckpointError):
            patch.setattr(*place, full)
            tensorize.compile_checkpoint(checkpoint, out, 0.5)
    tensorize.compile_checkpoint(checkpoint, out, 0.5)
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))
    assert not (out / WORK).exists()


def test_a_damaged_curve_is_made_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop("spectra", 9, checkpoint, tmp_path / "stopped")
    kept = sorted((tmp_path / "stopped" / WORK).glob("analysis-*/*.safetensors"))
    assert len(kept) == 9
    kept[0].write_bytes(kept[0].read_bytes()[:-7])
    tensorize.compile_checkpoint(checkpoint, tmp_path / "stopped", 0.5)
    assert "is damaged and is made again" in caplog.text
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


def test_another_checkpoint_begins_anew(checkpoint: Path, tmp_path: Path) -> None:
    """What was kept is found by the content of the weights, and not by their place."""
    stop("spectra", 9, checkpoint, tmp_path / "out")
    torch.manual_seed(7)
    saved(llama(), checkpoint)
    tensorize.compile_checkpoint(checkpoint, tmp_path / "out", 0.5)
    assert_same(tmp_path / "out", compiled(checkpoint, tmp_path / "compiled"))


def test_curves_are_kept_for_other_budgets(checkpoint: Path, tmp_path: Path) -> None:
    first = tensorize.compile_checkpoint(checkpoint, tmp_path / "a", 0.5, cache_dir=tmp_path / "c")
    other = tensorize.compile_checkpoint(checkpoint, tmp_path / "b", 0.3, cache_dir=tmp_path / "c")
    kept = [next(s for s in r.history if s.name == "spectra").summary for r in (first, other)]
    assert "kept by an earlier run" not in kept[0]
    assert "16 were kept by an earlier run" in kept[1]
    assert_same(tmp_path / "b", compiled(checkpoint, tmp_path / "compiled", 0.3))
