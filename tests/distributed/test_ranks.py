"""Ranks that follow a budget while a sharded model trains are those of one machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import tensorize
from tensorize import TensorizeError
from tensorize.base.sharded import own_part, whole
from tensorize.distributed import load, parallelize, save
from tensorize.training import RankSchedule
from tensorize.weight.install import factored
from tests.distributed import models, processes
from tests.distributed.models import CASES, loss_of, low_rank, mine, relative, words

Sizes = dict[str, int]
STEPS = 6


def mesh_of(sizes: Sizes) -> Any:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Run:
    """A model that trains while its ranks fall to three quarters of its parameters, and move on."""

    def __init__(self, model: nn.Module, mesh: Any = None, rule: str = "adam") -> None:
        budget = tensorize.Budget(params=3 * sum(p.numel() for p in model.parameters()) // 4)
        self.model, self.mesh = model, mesh
        if mesh is not None:
            parallelize(model, mesh)
        groups = tensorize.training.parameter_groups(model, 1e-2, rule=rule)
        kind: Any = {"adam": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}
        self.optimizer = kind[rule](groups)
        how: Any = {"start": 1, "end": 4, "every": 1, "until": STEPS, "rank_multiple": 4}
        self.schedule = RankSchedule(model, self.optimizer, budget, **how)

    def step(self, number: int) -> float:
        """The loss of all processes together; after an odd one the model is looked at."""
        ids = words(8, number)
        loss = loss_of(self.model, ids if self.mesh is None else mine(ids, self.mesh))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if number % 2:
            with torch.no_grad():
                loss_of(self.model, ids)  # FSDP2 keeps the outermost weights gathered
        self.schedule.step()
        told = loss.detach().clone()
        if self.mesh is not None:
            dist.all_reduce(told)
            told /= dist.get_world_size()
        return float(told)

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        return [weight.spec.ranks for _, weight in factored(self.model)]


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """What factors stand for: of these, not of factors, there is one answer."""
    return {
        name: weight.with_cores(tuple(whole(core.detach()) for core in weight.cores)).dense()
        for name, weight in factored(model)
    }


def ranks_are_those_of_one_machine(
    folder: Path, sizes: Sizes, case: str = "plain", rule: str = "adam", steps: int = STEPS
) -> None:
    build = CASES.get(case, _pivoted)
    alone, spread = Run(build(), rule=rule), Run(build(), mesh_of(sizes), rule)
    first = alone.ranks
    for number in range(steps):
        assert spread.step(number) == pytest.approx(alone.step(number), rel=3e-6), number
    assert alone.schedule.trace == spread.schedule.trace
    assert first != spread.ranks == alone.ranks
    assert any(change.grown for change in spread.schedule.trace) or steps < STEPS
    assert all(isinstance(p, DTensor) for p in spread.model.parameters())
    held = {id(p) for group in spread.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in spread.model.parameters()}
    for parameter, state in spread.optimizer.state.items():
        moments = [value for value in state.values() if value.dim() > 0]
        assert moments
        assert all(own_part(m).shape == own_part(parameter).shape for m in moments)
    if rule == "sgd":
        want, got = dense_weights(alone.model), dense_weights(spread.model)
        assert max(relative(got[name], want[name]) for name in want) < 1e-5
    assert tensorize.report(spread.model).sites == tensorize.report(alone.model).sites


def _pivoted() -> nn.Module:
    return low_rank(models.llama(), *models.ENDS, pivoted=True)


def a_stopped_run_goes_on(folder: Path, sizes: Sizes) -> None:
    """The schedule first, then the rest, as on one machine."""
    where = folder / "-".join(sizes)
    run = Run(CASES["plain"](), mesh_of(sizes))
    for number in range(3):
        run.step(number)
    save(run.model, run.optimizer, where, step=3).wait()
    state = run.schedule.state_dict()
    want = [run.step(number) for number in range(3, STEPS)]
    again = Run(CASES["plain"](), mesh_of(sizes))
    again.schedule.load_state_dict(state)
    assert load(again.model, again.optimizer, where) == 3
    assert [again.step(number) for number in range(3, STEPS)] == want
    assert again.ranks == run.ranks


one = ranks_are_those_of_one_machine
OFTEN_IN_TWO: list[processes.Check] = [partial(one, sizes={"dp": 2}, rule="sgd", steps=3)]
IN_TWO: list[processes.Check] = [
    partial(one, sizes={"dp": 2}, rule="sgd"),
    *(partial(one, sizes={"dp": 2}, case=case) for case in ("plain", "silu between", "pivoted")),
    *(partial(one, sizes={"tp": 2}, case=case) for case in ("plain", "compressed tied ends")),
    partial(one, sizes={"tp": 2}, case="GPT-2", rule="sgd"),
    partial(one, sizes={"tp": 2}, case="Mixtral", rule="sgd"),
    partial(a_stopped_run_goes_on, sizes={"dp": 2}),
    partial(a_stopped_run_goes_on, sizes={"tp": 2}),
]
IN_FOUR: list[processes.Check] = [
    partial(one, sizes={"dp": 2, "tp": 2}, case=case, rule=rule)
    for case, rule in (("plain", "sgd"), ("compressed tied ends", "adam"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "checks"), [(2, IN_TWO), (4, IN_FOUR)])
def test_processes(count: int, checks: list[processes.Check], tmp_path: Path) -> None:
    processes.run(checks, count, tmp_path)


def test_what_is_split_by_its_rank_keeps_it() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())

    def refused(cause: str, model: nn.Module, dimension: str = "tp", **options: Any) -> None:
        with models.identities_cost():
            spread = parallelize(model, mesh_of({dimension: 2}), **options)
        optimizer = torch.optim.SGD(spread.parameters(), lr=1.0)
        with pytest.raises(TensorizeError, match=cause):
            RankSchedule(spread, optimizer, 0.25, start=0, end=1)

    try:
        refused(
            r'(?s)q_proj.weight: its rank is split.*style="btp"', CASES["plain"](), style="naive"
        )
        refused(r"(?s)tokens.weight: over tp .* identity.*plain\(", CASES["no identity"]())
        refused(r"(?s)Stage is a part of a model.*without pp", CASES["plain"](), "pp")
    finally:
        dist.destroy_process_group()
