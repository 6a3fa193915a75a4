"""A run that stops goes on from its last whole checkpoint, on any mesh."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tensorize import CheckpointError
from tensorize.distributed import load, parallelize, save
from tests.distributed import models, processes
from tests.distributed.models import loss_of, mine, words
from tests.paths import ROOT

STEPS, SAVED = 4, 2


class Run:
    """A model, an optimizer, and a schedule of its rate; over a mesh, or on one machine."""

    def __init__(self, case: str = "plain", **sizes: int) -> None:
        self.model = models.CASES[case]().train()
        self.mesh = None
        if sizes:
            self.mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            parallelize(self.model, self.mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.rate = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.8)

    def step(self, number: int) -> float:
        ids = words(4, seed=number)
        loss = loss_of(self.model, ids if self.mesh is None else mine(ids, self.mesh))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rate.step()
        total = loss.detach().clone()
        if self.mesh is None or "dp" not in self.mesh.mesh_dim_names:
            return float(total)
        dist.all_reduce(total, group=self.mesh["dp"].get_group())
        return float(total) / self.mesh["dp"].size()

    def save(self, directory: Path, number: int) -> Any:
        return save(self.model, self.optimizer, directory, step=number, others={"rate": self.rate})

    def load(self, directory: Path) -> int:
        return load(self.model, self.optimizer, directory, others={"rate": self.rate})


def goes_on(
    folder: Path, saved_on: dict[str, int], *others: dict[str, int], case: str = "plain"
) -> None:
    alone = Run(case)
    want = [alone.step(number) for number in range(STEPS)]
    run, directory = Run(case, **saved_on), folder / case
    for number in range(SAVED):
        run.step(number)
    saving = run.save(directory, SAVED)
    # What comes after is not in it, though it is still being written.
    got = [run.step(number) for number in range(SAVED, STEPS)]
    assert got == pytest.approx(want[SAVED:], rel=2e-6)
    saving.wait()
    for sizes in others:
        again = Run(case, **sizes)
        again.step(7)  # of other values, which are gone then
        assert again.load(directory) == SAVED
        got = [again.step(number) for number in range(SAVED, STEPS)]
        assert got == pytest.approx(want[SAVED:], rel=2e-6), sizes


def goes_on_in_two(folder: Path) -> None:
    goes_on(folder, {"dp": 2}, {"tp": 2}, {})


def goes_on_in_four(folder: Path) -> None:
    goes_on(folder, {"dp": 2, "tp": 2}, {"dp": 4}, {"tp": 4}, {"dp": 1, "tp": 4}, {})


def experts_go_on_in_four(folder: Path) -> None:
    goes_on(folder, {"dp": 2, "tp": 2}, {"dp": 4}, {"tp": 4}, {}, case="Mixtral")


IN_TWO: list[processes.Check] = [goes_on_in_two]


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    processes.run([goes_on_in_four, experts_go_on_in_four], 4, tmp_path)


# --------------------------------------------------------------------------------- one machine


class Small:
    """A linear layer whose entries are the number of the step."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def save(self, directory: Path, step: int, **options: Any) -> Any:
        nn.init.constant_(self.model.weight, float(step))
        return save(self.model, self.optimizer, directory, step=step, **options)

    def loaded(self, directory: Path) -> tuple[int, float]:
        step = load(self.model, self.optimizer, directory)
        return step, float(self.model.weight.detach().mean())


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_last_ones_stay(tmp_path: Path) -> None:
    run = Small()
    for step in (1, 2, 3, 10):
        run.save(tmp_path, step)
    run.save(tmp_path, 11).wait()
    assert folders(tmp_path) == ["step-000000010", "step-000000011"]
    assert Small().loaded(tmp_path) == (11, 11.0)


def test_what_is_not_whole_is_not_taken_and_goes(tmp_path: Path) -> None:
    run = Small()
    run.save(tmp_path, 1).wait()
    run.save(tmp_path, 2).wait()
    (tmp_path / "step-000000002" / ".metadata").unlink()
    assert Small().loaded(tmp_path) == (1, 1.0)
    run.save(tmp_path, 2).wait()
    assert Small().loaded(tmp_path) == (2, 2.0)


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from tests.distributed.test_checkpoints import Small
top = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=(top / "meeting").as_uri(), rank=0, world_size=1)
run = Small()
run.save(top / "run", 1).wait()
FileSystemWriter.finish = lambda *_: time.sleep(600)  # all is written but what makes it whole
run.save(top / "run", 2)
while not list((top / "run" / "step-000000002").glob("*.distcp")):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_saving_costs_that_save_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert folders(tmp_path / "run") == ["step-000000001", "step-000000002"]
    assert Small().loaded(tmp_path / "run") == (1, 1.0)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    run = Small()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        run.loaded(tmp_path)
    run.save(tmp_path, 1).wait()
    run.model = nn.Linear(4, 2)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    with pytest.raises(CheckpointError, match="of another model"):
        run.loaded(tmp_path)
    with pytest.raises(CheckpointError, match="there already"):
        run.save(tmp_path, 1)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        Small().save(tmp_path / "a file", 1)
    shutil.rmtree(tmp_path)
