"""Healing a sharded model is healing the model: each process learns from its part of a batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tensorize
from tensorize import CaptureError
from tensorize.base.sharded import is_sharded, whole
from tensorize.distributed import parallelize
from tensorize.training import healing
from tests.distributed import models, processes
from tests.distributed.models import mine, words

Sizes = dict[str, int]
STEPS = 6


def mesh_of(sizes: Sizes) -> Any:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def same_values(one: nn.Module, other: nn.Module) -> float:
    """The largest relative difference of a parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(models.relative(whole(p.detach()), whole(q.detach())) for p, q in pairs)


class Perceptron(nn.Module):
    """Sizes that two processes do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(21, 45), nn.Linear(45, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def perceptrons(rank: int = 7) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Perceptron()
    return tensorize.compile(dense, ranks={"*": rank}, budget=None, metric="frobenius"), dense


def numbers(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8, 21, generator=draw) for _ in range(count)]


def each_process_learns_from_its_own(folder: Path) -> None:
    """What one process learns from the batches of all, to rounding; gradients stay the caller's."""
    (alone, dense), mesh, data = perceptrons(), mesh_of({"dp": 2}), numbers(5)
    how: dict[str, Any] = {"steps": STEPS, "train": "all", "loss_fn": _squares(dense)}
    want = tensorize.heal(alone, dense, data, held_out=data[:2], **how)
    assert want.best_step > 0
    assert want.after < want.before

    spread = parallelize(perceptrons()[0], mesh)
    parts = [mine(batch, mesh) for batch in data]
    spread(parts[0]).sum().backward()
    grads = [p.grad for p in spread.parameters()]
    kept = [whole(grad).clone() for grad in grads if grad is not None]
    with torch.no_grad():
        spread(parts[0])  # now the outermost weights are gathered
    got = tensorize.heal(spread, dense, parts, held_out=parts[:2], **how)
    assert all(map(is_sharded, spread.parameters()))
    assert all(p.grad is grad for p, grad in zip(spread.parameters(), grads, strict=True))
    after = [whole(grad) for grad in grads if grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert got.best_step == want.best_step
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    assert [x for _, x in got.checks] == pytest.approx([x for _, x in want.checks], rel=1e-5)
    moved = same_values(alone, perceptrons()[0])
    assert same_values(spread, alone) < 1e-4 * moved
    assert _everywhere(got)


def the_best_values_are_taken_again(folder: Path) -> None:
    """Steps that are too large are taken back, of what was gathered meanwhile too."""
    (alone, dense), mesh, data = perceptrons(12), mesh_of({"dp": 2}), numbers(5)
    how: dict[str, Any] = {"steps": 4 * STEPS, "loss_fn": _squares(dense), "rate": 0.3}
    want = tensorize.heal(alone, dense, data, held_out=data[:2], patience=1, **how)
    assert want.checks[0][1] > 2 * want.before > 2 * want.after
    spread, parts = parallelize(perceptrons(12)[0], mesh), [mine(batch, mesh) for batch in data]
    got = tensorize.heal(spread, dense, parts, held_out=parts[:2], patience=1, **how)
    assert got.losses == pytest.approx(want.losses, rel=1e-3)
    assert _everywhere(got)


def _squares(dense: nn.Module) -> Any:
    return lambda outputs, batch: F.mse_loss(outputs, dense(batch).detach())


def _everywhere(value: Any) -> bool:
    """Whether all processes have the same."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return all(other == found[0] for other in found)


def processes_decide_the_same(folder: Path) -> None:
    """Whatever each of them has seen, and what is not of theirs to decide is refused in all."""
    small, dense = perceptrons()
    small.requires_grad_(False)
    rank = dist.get_rank()
    own = [batch * (1 + rank) for batch in numbers(8)[rank::2]]
    how: dict[str, Any] = {"compute_dtype": torch.bfloat16}
    spread, dense = (parallelize(each, mesh_of({"dp": 2}), **how) for each in (small, dense))
    assert _everywhere(tensorize.heal(spread, dense, own, steps=STEPS))
    before = [whole(p.detach()).clone() for p in spread.parameters()]
    with pytest.raises(CaptureError, match=r"4, 1 and 2; 4, 2 and 2\n.*as many of each"):
        tensorize.heal(spread, dense, own, held_out=own[: 1 + rank], steps=2)
    wrong = [torch.full_like(batch, torch.nan) if rank else batch for batch in own]
    with pytest.raises(CaptureError, match="not finite on the held-out"):
        tensorize.heal(spread, dense, own, held_out=wrong, steps=2, loss_fn=_squares(dense))
    after = [whole(p.detach()) for p in spread.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def a_killed_one_goes_on(folder: Path, sizes: Sizes) -> None:
    """To the same bits: one process writes the state whole, each takes its part."""
    mesh, (_, dense) = mesh_of(sizes), perceptrons()
    if "tp" in sizes:
        dense, data = models.llama(), [words(4, seed) for seed in range(5)]
        build: Any = models.CASES["plain"]
    else:
        data, build = numbers(5), lambda: perceptrons()[0]
    parts = [mine(batch, mesh) for batch in data]
    where = folder / "-".join(sizes)

    def healed(**how: Any) -> tuple[nn.Module, Any]:
        spread = parallelize(build(), mesh)
        return spread, tensorize.heal(spread, dense, parts, steps=8, **how)

    def killed(file: Any, data: Any) -> None:
        write(file, data)
        raise KeyboardInterrupt

    want, told = healed()
    write = healing._File.write
    with mock.patch.object(healing._File, "write", killed), pytest.raises(KeyboardInterrupt):
        healed(checkpoint_dir=where)
    assert [path.name for path in where.iterdir()] == [healing.STATE]
    got, once_more = healed(checkpoint_dir=where)
    assert once_more == told
    assert same_values(got, want) == 0


def a_decoder_learns_as_on_one_machine(folder: Path, sizes: Sizes) -> None:
    """Over dp rows are hidden, of one process more than of another: all that are left count."""
    mesh, build = mesh_of(sizes), models.CASES["plain"]
    joint = [_hidden(words(8, seed)) for seed in range(4)]
    parts = [{name: mine(value, mesh) for name, value in batch.items()} for batch in joint]
    alone, spread = build(), parallelize(build(), mesh)
    want = tensorize.heal(alone, models.llama(), joint, held_out=joint[:1], steps=STEPS)
    got = tensorize.heal(spread, models.llama(), parts, held_out=parts[:1], steps=STEPS)
    assert 0 < got.best_step == want.best_step
    assert got.losses == pytest.approx(want.losses, rel=1e-4)
    # Adam makes much of small differences where gradients are near zero.
    assert same_values(spread, alone) < 1e-2 * same_values(alone, build())
    assert _everywhere(got)


def _hidden(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[:3, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


OFTEN_IN_TWO: list[processes.Check] = [
    each_process_learns_from_its_own,
    the_best_values_are_taken_again,
    processes_decide_the_same,
]
IN_TWO: list[processes.Check] = [
    partial(a_killed_one_goes_on, sizes={"dp": 2}),
    partial(a_killed_one_goes_on, sizes={"tp": 2}),
    partial(a_decoder_learns_as_on_one_machine, sizes={"dp": 2}),
    partial(a_decoder_learns_as_on_one_machine, sizes={"tp": 2}),
]
IN_FOUR: list[processes.Check] = [
    partial(a_decoder_learns_as_on_one_machine, sizes={"dp": 2, "tp": 2}),
    partial(a_killed_one_goes_on, sizes={"dp": 2, "tp": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "checks"), [(2, IN_TWO), (4, IN_FOUR)])
def test_processes(count: int, checks: list[processes.Check], tmp_path: Path) -> None:
    processes.run(checks, count, tmp_path)
