"""Checks that run in several processes: models in parts that are guarded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tensorize
from tensorize.checking.faults import Fault
from tensorize.distributed import guarding, parallelize
from tests.distributed.models import CASES, gradients, loss_of, words

FAULTY, BITS = 1, [31, 28]
DATA = [words(8, seed) for seed in range(20, 24)]
FIRST, SECOND = (
    "model.layers.0.mlp.up_proj.first.weight",
    "model.layers.0.mlp.up_proj.second.weight",
)
WRITER = "model.layers.0.mlp.down_proj.weight"


def split(case: str) -> Any:
    model = CASES[case]().requires_grad_(False)
    return parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))


def guarded(case: str, **options: Any) -> Any:
    return tensorize.guard(split(case), calibration=DATA, **options)


def faults(model: nn.Module) -> tuple[Fault, ...]:
    return tensorize.guard_report(model).faults


def here() -> bool:
    return dist.get_rank() == FAULTY


def own(model: nn.Module, name: str) -> Tensor:
    held: Any = model.get_parameter(name)
    with torch.no_grad():
        return held.to_local().data


@torch.no_grad()
def the_same_and_no_fault(folder: Path, cases: Sequence[str]) -> None:
    for case in cases:
        model = split(case)
        want = model(words(4)).logits
        tensorize.guard(model, calibration=DATA)
        assert torch.equal(model(words(4)).logits, want), case
        model(words(64, 40))
        report = tensorize.guard_report(model)
        assert report.faults == (), case
        assert "sum over ranks" in {site.use for site in report.sites}, case


@torch.no_grad()
def every_process_names_the_rank_whose_arithmetic_was_wrong(folder: Path) -> None:
    model = guarded("some dense")
    want = model(words(4)).logits
    for seed in range(12):
        rate = 0.1 if here() else 0.0
        how: Any = {"where": ("inputs", "intermediates"), "bits": BITS, "most": 1, "seed": seed}
        with tensorize.inject(model, rate=rate, **how):
            assert torch.allclose(model(words(4)).logits, want, rtol=0, atol=1e-4)
    seen = faults(model)
    assert {(f.rank, f.outcome) for f in seen} == {(FAULTY, "recomputed")}
    names: list[Any] = [None, None]
    dist.all_gather_object(names, [f.weight for f in seen])
    summed = [
        name for name in names[FAULTY] if "first" in name or name.endswith("down_proj.weight")
    ]
    assert names[1 - FAULTY] == summed  # all that goes into a sum; a rank's own rows are its own
    assert summed


@torch.no_grad()
def a_damaged_part_of_a_weight_is_mended_by_its_rank(folder: Path) -> None:
    model = guarded("some dense")
    want = model(words(4)).logits
    for name in (FIRST.replace("0", "1"), WRITER):
        part = own(model, name)
        whole = part.clone()
        if here():
            part.view(torch.int32)[3, 5] ^= 1 << 29
        assert torch.equal(model(words(4)).logits, want), name
        assert torch.equal(part, whole)
        last = faults(model)[-1]
        assert (last.weight, last.rank, last.outcome) == (name, FAULTY, "mended")
    if here():
        own(model, SECOND.replace("0", "1"))[2, 3] += 1
    assert len(tensorize.scrub(model)) == here()
    assert torch.equal(model(words(4)).logits, want)


@torch.no_grad()
def a_part_that_stays_wrong_stops_every_process_by_its_name(folder: Path) -> None:
    for on_fault, case, name in (("raise", "some dense", WRITER), ("recompute", "plain", FIRST)):
        model = guarded(case, on_fault=on_fault)
        part = own(model, name)
        if here():
            part[1:4, 2:5] += 1.0  # more than sums can tell apart
            own(model, name.replace("up_", "gate_"))[2, 3] += 1.0  # beside it one that is mended
        damaged = part.clone()
        with pytest.raises(tensorize.FaultError, match=f"on rank {FAULTY}") as told:
            model(words(4))
        assert told.value.site == name
        assert torch.equal(part, damaged)
        last = faults(model)[-1]
        assert (last.weight, last.rank, last.outcome) == (name, FAULTY, "raised")


@torch.no_grad()
def a_sum_that_is_wrong_itself_is_told(folder: Path) -> None:
    right = guarding.summed

    def wrong(x: Tensor, ranks: Any) -> Tensor:
        y = right(x, ranks)
        y.flatten()[7] += 1.0
        return y

    for case in ("plain", "some dense"):
        model = guarded(case)
        with (
            mock.patch.object(guarding, "summed", wrong),
            pytest.raises(tensorize.FaultError, match="as the ranks' sum, is off"),
        ):
            model(words(4))


def gradients_are_those_without_a_guard(folder: Path) -> None:
    model = split("some dense").requires_grad_(True)
    loss_of(model, words(4)).backward()
    want = gradients(model)
    model.zero_grad()
    tensorize.guard(model, calibration=DATA)
    loss_of(model, words(4)).backward()
    got = gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert faults(model) == ()


@torch.no_grad()
def wrong(gradient: Tensor) -> Tensor:
    """What the products of a backward get, and the check did not."""
    return gradient + gradient.roll(1, 0)


def a_step_is_skipped_by_all_processes(folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
    layer = model.module[0]
    torch.manual_seed(dist.get_rank())
    tensorize.guard(model, calibration=[torch.randn(64, 8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for spoilt in (True, False):
        before, x = layer.weight.detach().clone(), torch.randn(64, 8)
        how = wrong if spoilt and here() else torch.clone
        hook = layer.register_forward_hook(
            lambda *call, how=how: call[-1].register_hook(how) and None
        )
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        hook.remove()
        assert torch.equal(layer.weight, before) == spoilt
        assert tensorize.guard_report(model).skipped == 1
    assert len(faults(model)) == here()


@torch.no_grad()
def a_rank_mends_its_part_from_the_artefact(folder: Path) -> None:
    model = CASES["plain"]().requires_grad_(False)
    if dist.get_rank() == 0:
        tensorize.save(model, folder / "kept")
    dist.barrier()
    model = tensorize.load(folder / "kept", model=copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    tensorize.guard(parallelize(model, mesh), calibration=DATA)
    want = model(words(4)).logits
    if here():
        own(model, FIRST)[1:4, 2:5] += 1.0
    assert torch.equal(model(words(4)).logits, want)
    assert [(f.rank, f.outcome) for f in faults(model)] == [(FAULTY, "mended")]


IN_TWO = [
    partial(the_same_and_no_fault, cases=["some dense"]),
    every_process_names_the_rank_whose_arithmetic_was_wrong,
    a_part_that_stays_wrong_stops_every_process_by_its_name,
    a_step_is_skipped_by_all_processes,
]

SELDOM = [
    *(partial(the_same_and_no_fault, cases=[name]) for name in CASES if "integers" not in name),
    a_damaged_part_of_a_weight_is_mended_by_its_rank,
    a_sum_that_is_wrong_itself_is_told,
    gradients_are_those_without_a_guard,
    a_rank_mends_its_part_from_the_artefact,
]
