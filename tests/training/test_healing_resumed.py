"""A healing that was killed goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.training import healing
from tests.paths import ROOT
from tests.training.healed_models import changed, models, noisy_run, texts, values

KILLED = """
import os, signal, sys, torch, tensorize
from tests.training.healed_models import Noisy, noisy_run
def progress(stage, done, total):
    if done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
noisy_run(sys.argv[1], progress)
"""


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 23])
def test_a_killed_run_goes_on_to_the_same_bits(step: int, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(step=step), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    seen: list[int] = []
    done, small = noisy_run(tmp_path, lambda stage, at, total: seen.append(at))
    want, untouched = noisy_run(None)
    assert seen[0] == 4 * (step // 4)  # the last check before it was killed
    assert done == want
    assert all(torch.equal(value, values(untouched)[n]) for n, value in values(small).items())
    again, _ = noisy_run(tmp_path)  # of a run that has ended, the result is read
    assert again == want


def test_an_interrupted_run_goes_on_in_the_same_process(tmp_path: Path) -> None:
    (dense, small), (_, other) = models(), models()
    want = tensorize.heal(other, dense, texts(8), steps=32)

    def progress(stage: str, done: int, total: int) -> None:
        if done == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorize.heal(small, dense, texts(8), steps=32, checkpoint_dir=tmp_path, progress=progress)
    assert tensorize.heal(small, dense, texts(8), steps=32, checkpoint_dir=tmp_path) == want
    assert not changed(small, values(other))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{healing.STATE}-1-0.tmp").write_bytes(b"half of it")
    (tmp_path / "mine.tmp").touch()
    dense, small = models()
    tensorize.heal(small, dense, texts(8), steps=1, checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [healing.STATE, "mine.tmp"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    dense, small = models()
    start = values(small)
    tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path)
    small.load_state_dict(start)
    for options in ({"steps": 5}, {"seed": 1}, {"train": "all"}):
        with pytest.raises(CheckpointError, match="other weights, data or settings"):
            tensorize.heal(
                small, dense, texts(8), checkpoint_dir=tmp_path, **{"steps": 4, **options}
            )
    with pytest.raises(CheckpointError, match="other weights, data or settings"):
        tensorize.heal(small, dense, texts(8, seed=2), steps=4, checkpoint_dir=tmp_path)
    (tmp_path / healing.STATE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path)
    assert not changed(small, start)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path / "file")
