"""Stages of a pipeline have the gradients of one machine, under the names of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import tensorize
from tensorize import CaptureError, TensorizeError
from tensorize.distributed import load, parallelize, save, schedule
from tests.distributed import models, processes
from tests.distributed.models import ENDS, loss_fn, loss_of, low_rank, mine, relative, words


def four_blocks() -> Any:
    return low_rank(models.llama(layers=4), *ENDS)


def over(**sizes: int) -> Any:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


CASES: dict[str, Callable[[], Any]] = {
    "plain": four_blocks,
    "silu between": lambda: low_rank(models.llama(layers=4), *ENDS, nonlinearity="silu"),
    "shared first factors": models.shared,
    "fewer key heads than ranks": lambda: low_rank(models.llama(keys=1, layers=4), *ENDS),
    "compressed ends": lambda: low_rank(models.llama(layers=4)),
    "integers of 8 bits": models.CASES["integers of 8 bits"],
    "Mixtral": models.CASES["Mixtral"],
    "GPT-2, untied": lambda: low_rank(models.gpt2(tied=False)),
}


def same_gradients(folder: Path, kind: str, chunks: int, case: str = "plain", **sizes: int) -> None:
    alone = CASES[case]()
    loss = loss_of(alone, words(8))
    loss.backward()
    want = models.gradients(alone)
    mesh = over(**sizes)
    stage = parallelize(CASES[case](), mesh, chunks=chunks)
    run = schedule(stage, loss_fn, kind, microbatches=4)
    mean = run.step(mine(words(8), mesh))
    if "dp" in sizes:
        dist.all_reduce(mean, group=mesh["dp"].get_group())
        mean /= sizes["dp"]
    assert float(mean) == pytest.approx(float(loss.detach()), rel=1e-6)
    got = models.gradients(stage)
    assert 0 < len(got) < len(want)
    assert max(relative(got[name], want[name]) for name in got) < 2e-6, (kind, case, sizes)


def same(kind: str, chunks: int = 1, case: str = "plain", **sizes: int) -> processes.Check:
    return partial(same_gradients, kind=kind, chunks=chunks, case=case, **sizes)


def a_pipeline_goes_on_without_one(folder: Path) -> None:
    stage = parallelize(four_blocks(), over(pp=2))
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.5, momentum=0.9)
    run = schedule(stage, loss_fn, microbatches=4)
    losses = []
    for number in range(3):
        if number == 2:
            save(stage, optimizer, folder / "run", step=number).wait()
        losses.append(float(run.step(words(8, number))))
        optimizer.step()
        optimizer.zero_grad()
    alone = four_blocks()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5, momentum=0.9)
    assert load(alone, optimizer, folder / "run") == 2
    assert float(loss_of(alone, words(8, 2)).detach()) == pytest.approx(losses[2], rel=1e-6)


def a_stage_on_meta_is_filled(folder: Path) -> None:
    def made(**options: Any) -> Any:
        with torch.device("meta"):
            return tensorize.initialize(models.llama_of(), 0.5, **options)

    want = made().state_dict()
    stage = tensorize.training.fill(parallelize(made(device="meta"), over(pp=2)))
    got = stage.state_dict()
    assert 0 < len(got) < len(want)
    assert all(torch.equal(got[name], want[name]) for name in got)


IN_TWO: list[processes.Check] = [
    same("1f1b", pp=2),
    same("zero-bubble", 2, pp=2),
    a_pipeline_goes_on_without_one,
    a_stage_on_meta_is_filled,
]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    processes.run(IN_TWO, 2, tmp_path)


@pytest.mark.slow
def test_two_processes_with_all_schedules(tmp_path: Path) -> None:
    processes.run([same("gpipe", pp=2), same("interleaved", 2, pp=2)], 2, tmp_path)


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    checks = [same("1f1b", case=case, pp=2, tp=2) for case in CASES]
    checks.append(same("1f1b", pp=2, dp=2))
    processes.run([*checks, same("zero-bubble", 2, pp=2, tp=2)], 4, tmp_path)


def test_what_no_stage_can_be_made_of_is_refused() -> None:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = over(pp=4)
        with pytest.raises(CaptureError, match=r"2 blocks for 4 stages\n.*pp=2"):
            parallelize(models.llama(), mesh)
        with pytest.raises(CaptureError, match="shares its weight with the embedding"):
            parallelize(models.llama(layers=4, tied=True), mesh)
        with pytest.raises(TensorizeError, match="a Linear is no stage"):
            schedule(torch.nn.Linear(2, 2), loss_fn)
        stage = parallelize(models.llama(layers=4), mesh)
        with pytest.raises(TensorizeError, match=r"'interleaved' runs several.*\n.*chunks=2"):
            schedule(stage, loss_fn, "interleaved")
    finally:
        dist.destroy_process_group()
