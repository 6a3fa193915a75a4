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
from tensorize import CaptureError, CheckpointError, TensorizeError
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
    "tied": models.CASES["tied"],
    "tied of four blocks": lambda: low_rank(models.llama(tied=True, layers=4), models.EMBEDDING),
    "compressed tied ends": models.CASES["compressed tied ends"],
    "integers of 8 bits": models.CASES["integers of 8 bits"],
    "integers of 4 bits": models.CASES["integers of 4 bits"],
    "Mixtral": models.CASES["Mixtral"],
    "GPT-2, tied": models.CASES["GPT-2"],
    "GPT-2, untied": lambda: low_rank(models.gpt2(tied=False)),
}


def same_gradients(folder: Path, kind: str, chunks: int, case: str = "plain", **sizes: int) -> None:
    alone = CASES[case]()
    loss = loss_of(alone, words(8))
    loss.backward()
    named = alone.named_parameters(remove_duplicate=False)  # a stage may have any of the names
    want = {name: p.grad for name, p in named if p.grad is not None}
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


class Run:
    """A tied model and its optimizer, as stages over a mesh or on one machine."""

    def __init__(self, mesh: Any = None) -> None:
        self.model = CASES["compressed tied ends"]()
        if mesh is not None:
            self.model = parallelize(self.model, mesh)
            self.run = schedule(self.model, loss_fn, microbatches=4)
        self.on_stages = mesh is not None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)

    def step(self, number: int) -> float:
        if self.on_stages:
            loss = self.run.step(words(8, number))
        else:
            loss = loss_of(self.model, words(8, number))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def a_pipeline_goes_on_without_one_and_back(folder: Path, **others: int) -> None:
    mesh = over(pp=2, **others)
    unbroken, stages, alone, again = Run(), Run(mesh), Run(), Run(mesh)
    want = [unbroken.step(number) for number in range(4)]
    assert [stages.step(number) for number in range(2)] == pytest.approx(want[:2], rel=1e-6)
    save(stages.model, stages.optimizer, folder / "stages", step=2).wait()
    assert load(alone.model, alone.optimizer, folder / "stages") == 2
    assert alone.step(2) == pytest.approx(want[2], rel=1e-6)
    save(alone.model, alone.optimizer, folder / "alone", step=3).wait()
    again.step(7)  # of other values, which are gone then
    assert load(again.model, again.optimizer, folder / "alone") == 3
    assert again.step(3) == pytest.approx(want[3], rel=1e-6)


def stages_are_checkpointed(folder: Path) -> None:
    alone, mesh = four_blocks(), over(pp=2)
    loss_of(alone, words(8)).backward()
    want = models.gradients(alone)
    stage = parallelize(four_blocks().train(), mesh)
    assert tensorize.training.checkpoint_low_rank(stage) == 2
    run = schedule(stage, loss_fn, microbatches=4)
    run.step(words(8))
    got = models.gradients(stage)
    assert max(relative(got[name], want[name]) for name in got) < 2e-6


def gradients_of_two_batches_add_up(folder: Path) -> None:
    alone, stages = Run(), Run(over(pp=2))
    for number in range(2):
        loss_of(alone.model, words(8, number)).backward()
        stages.run.step(words(8, number))
    want = dict(alone.model.named_parameters(remove_duplicate=False))
    for name, parameter in stages.model.named_parameters():
        assert relative(parameter.grad, want[name].grad) < 2e-6, name


def tied_values_stay_one_where_steps_draw_numbers(folder: Path) -> None:
    stage: Any = parallelize(CASES["tied"]().bfloat16(), over(pp=2))
    run = schedule(stage, loss_fn, microbatches=4)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-4)
    tensorize.training.round_stochastically(optimizer)
    apart = []
    for number in range(3):
        run.step(words(8, number))
        (tie,) = stage.ties
        values = stage.get_parameter(tie.here)
        everywhere = [torch.empty_like(values.grad) for _ in range(2)]
        dist.all_gather(everywhere, values.grad)
        assert torch.equal(*everywhere)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_gather(everywhere, values.detach())
        apart.append(float((everywhere[0] - everywhere[1]).abs().max()))
    assert 0 < max(apart) <= 2 * min(apart)  # what one step makes of it, and no more


def a_stage_on_meta_is_filled(folder: Path) -> None:
    for tied, exclude in ((False, None), (True, None), (True, "*embed*")):

        def made(tied: bool = tied, exclude: str | None = exclude, **options: Any) -> Any:
            with torch.device("meta"):
                model = models.llama_of(tie_word_embeddings=tied)
            return tensorize.initialize(model, 0.5, exclude=exclude, **options)

        want = made().state_dict()
        stage = tensorize.training.fill(parallelize(made(device="meta"), over(pp=2)))
        got = stage.state_dict()
        assert 0 < len(got) < len(want)
        assert all(torch.equal(got[name], want[name]) for name in got)


OFTEN_IN_TWO: list[processes.Check] = [same("1f1b", case="tied", pp=2)]
IN_TWO: list[processes.Check] = [
    same("1f1b", pp=2),
    same("zero-bubble", 2, pp=2),
    same("1f1b", case="compressed tied ends", pp=2),
    a_pipeline_goes_on_without_one_and_back,
    gradients_of_two_batches_add_up,
    stages_are_checkpointed,
    tied_values_stay_one_where_steps_draw_numbers,
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
    checks += [same("1f1b", case=case, pp=2, dp=2) for case in ("plain", "tied")]
    checks.append(same("gpipe", case="tied of four blocks", pp=4))
    checks.append(same("interleaved", 2, case="tied of four blocks", pp=2, tp=2))
    checks.append(partial(a_pipeline_goes_on_without_one_and_back, tp=2))
    processes.run([*checks, same("zero-bubble", 2, pp=2, tp=2)], 4, tmp_path)


def a_checkpoint_of_stages(folder: Path) -> None:
    stage: Any = parallelize(CASES["tied"](), over(pp=2))
    optimizer = torch.optim.AdamW(stage.parameters())
    run = schedule(stage, loss_fn, microbatches=4)
    run.step(words(8))
    optimizer.step()
    save(stage, optimizer, folder / "run", step=1).wait()


@pytest.mark.slow
def test_what_a_stage_says_of_being_saved_works(tmp_path: Path) -> None:
    """In one process: load the checkpoint that stages wrote, and save that."""
    processes.run([a_checkpoint_of_stages], 2, tmp_path)
    model, trained = CASES["tied"](), CASES["tied"]()
    optimizer = torch.optim.AdamW(model.parameters())
    assert load(model, optimizer, tmp_path / "run") == 1
    tensorize.save(model, tmp_path / "model")
    loss_of(trained, words(8)).backward()
    torch.optim.AdamW(trained.parameters()).step()
    found = tensorize.load(tmp_path / "model", model=CASES["tied"]())
    with torch.no_grad():
        before, want, got = (loss_of(each, words(8)) for each in (CASES["tied"](), trained, found))
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert float(want) < float(before) - 1e-3


def test_what_no_stage_can_be_made_of_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = over(pp=4)
        with pytest.raises(CaptureError, match=r"2 blocks for 4 stages\n.*pp=2"):
            parallelize(models.llama(), mesh)
        tied = models.llama(layers=4, tied=True)
        with pytest.raises(CaptureError, match=r"two stages of one rank.*\n.*chunks=1"):
            parallelize(tied, over(pp=1, dp=4), chunks=2)
        with pytest.raises(TensorizeError, match="a Linear is no stage"):
            schedule(torch.nn.Linear(2, 2), loss_fn)
        compressed = four_blocks()
        stage = parallelize(compressed, mesh)
        with pytest.raises(CheckpointError, match=r"Stage is a part of a model(.|\n)*load\("):
            tensorize.save(stage, tmp_path)
        with pytest.raises(CaptureError, match=r"stage of .* computes nothing.*\n.*without pp"):
            tensorize.heal(stage, models.llama(layers=4), [words(2)], steps=1)
        assert tensorize.report(stage).sites == tensorize.report(compressed).sites
        with pytest.raises(TensorizeError, match=r"'interleaved' runs several.*\n.*chunks=2"):
            schedule(stage, loss_fn, "interleaved")
    finally:
        dist.destroy_process_group()
