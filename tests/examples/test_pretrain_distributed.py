"""The example that pre-trains over a mesh: stopped and gone on with, on one process and on two."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

import tensorize
from examples import pretrain_distributed
from tests.paths import ROOT

SMALL = [
    "--hidden-size", "32", "--intermediate-size", "48", "--num-hidden-layers", "2",
    "--num-attention-heads", "4", "--num-key-value-heads", "2", "--batch", "4", "--context", "16",
]  # fmt: skip


def pretrain(out: Path, steps: int) -> list[float]:
    return pretrain_distributed.main([*SMALL, "--out", str(out), "--steps", str(steps)])


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", 6)
    assert pretrain(tmp_path / "parts", 3) == whole[:3]
    assert pretrain(tmp_path / "parts", 6) == whole[3:]
    tensorize.load(tmp_path / "parts" / "model")


def lines_for_a_mesh() -> int:
    return Path(pretrain_distributed.__file__).read_text().count("  # mesh\n")


def test_six_lines_differ_from_one_machine() -> None:
    assert lines_for_a_mesh() == 6


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}, {"pp": 2, "dp": 1, "tp": 2}])
def test_several_processes_go_on_for_one(tmp_path: Path, mesh: dict[str, int]) -> None:
    whole = pretrain(tmp_path / "whole", 6)
    pretrain(tmp_path / "parts", 3)
    (tmp_path / "parts" / "model" / "tensorize.json").unlink()
    count = str(math.prod(mesh.values()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count]
    asked = [*SMALL, "--out", str(tmp_path / "parts"), "--steps", "6"]
    asked += [word for name, size in mesh.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(
        [*torchrun, "-m", "examples.pretrain_distributed", *asked],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"step 6: loss {whole[-1]:.3f}" in done.stdout
    assert pretrain(tmp_path / "parts", 6) == []  # one process writes the model where stages do not
    tensorize.load(tmp_path / "parts" / "model")
