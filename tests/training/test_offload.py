"""Updates in sub-groups on host and device: the same bits, and the time and memory they take."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils import _pytree as pytree

import tensorize
from tensorize.base.errors import TensorizeError
from tensorize.training import offload, parameter_groups
from tensorize.training.host_updates import UpdateRates, best_stride, update_seconds, update_spans
from tensorize.training.memory import LiveBytes
from tensorize.training.offload import _local, measured_rates

STEPS = 20


def model() -> nn.Module:
    """A compressed one, from scratch."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    return tensorize.initialize(dense, 0.5, example_inputs=(torch.zeros(1, 48),), progress=False)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 48, generator=generator)


def adamw(trained: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(trained, 1e-2, 0.1))


def train(trained: nn.Module, optimizer: Any, backward: Any = None) -> list[Tensor]:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for x in batches():
        loss = trained(x).square().mean()
        if backward is None:
            loss.backward()
        else:
            with backward():
                loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    states = pytree.tree_leaves(sorted(optimizer.state_dict()["state"].items()))
    return [t.detach().clone() for t in (*trained.parameters(), *states) if isinstance(t, Tensor)]


@pytest.fixture(scope="module")
def wanted() -> list[Tensor]:
    trained = model()
    return train(trained, adamw(trained))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4])
def test_20_steps_are_the_same_bits(stride: int, overlapping: bool, wanted: list[Tensor]) -> None:
    trained = model()
    optimizer = adamw(trained)
    handle = offload(optimizer, stride=stride, size=700, device="cpu")
    assert len(handle.groups) > 4
    backward = handle.last_backward if overlapping else None
    assert same(train(trained, optimizer, backward), wanted)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_other_optimizers_are_themselves(kind: Any) -> None:
    alone, beside = model(), model()
    first = train(alone, kind(alone.parameters(), lr=1e-2))
    optimizer = kind(beside.parameters(), lr=1e-2)
    offload(optimizer, stride=2, size=700, device="cpu")
    assert same(train(beside, optimizer), first)


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as FSDP2 keeps it on the host; learning rates are those of whole cores."""
    trained, mesh = model(), init_device_mesh("cpu", (1,))
    groups = parameter_groups(trained, 1e-2, 0.1)
    names = {id(p): name for name, p in trained.named_parameters()}
    named = [[names[id(p)] for p in group["params"]] for group in groups]
    for module in (*trained, trained):
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    now = dict(trained.named_parameters())
    for group, own in zip(groups, named, strict=True):
        group["params"] = [now[name] for name in own]
    return trained, torch.optim.AdamW(groups)


def test_what_fsdp_keeps_on_the_host_is_updated_in_sub_groups(tmp_path: Path) -> None:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    meet = f"file://{tmp_path}/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        first = train(*sharded())
        trained, optimizer = sharded()
        handle = offload(optimizer, stride=2, size=700, device="cpu")
        found = train(trained, optimizer, handle.last_backward)
        assert all(torch.equal(_local(a), _local(b)) for a, b in zip(found, first, strict=True))
    finally:
        distributed.destroy_process_group()


def test_it_is_off_without_an_accelerator_unless_asked() -> None:
    optimizer = adamw(model())
    if torch.accelerator.current_accelerator() is None:
        assert offload(optimizer).stride == 0
        with pytest.raises(TensorizeError, match="accelerator"):
            offload(optimizer, stride=2)


def test_it_is_undone() -> None:
    trained = model()
    optimizer = adamw(trained)
    own = optimizer.step
    handle = offload(optimizer, stride=1, device="cpu")
    assert optimizer.step != own
    handle.remove()
    assert optimizer.step == own


def test_what_cannot_be_updated_in_sub_groups_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    with pytest.raises(TensorizeError, match="sub-groups"):
        offload(torch.optim.LBFGS(parameters))
    for wrong in ({"stride": -1}, {"size": 0}):
        with pytest.raises(TensorizeError, match="way out"):
            offload(torch.optim.SGD(parameters), **wrong)


class Peak(LiveBytes):
    """The most bytes that were alive at once."""

    most = 0

    def __torch_dispatch__(self, *given: Any) -> Any:
        found = super().__torch_dispatch__(*given)
        self.most = max(self.most, self.bytes)
        return found


@pytest.mark.parametrize("sizes", [(8, 64), (1, 256), (30, 16)])
def test_the_peak_of_the_host_is_as_predicted(sizes: tuple[int, int]) -> None:
    count, width = sizes
    with Peak(()) as peak:
        parameters = [nn.Parameter(torch.ones(width, width)) for _ in range(count)]
        optimizer = torch.optim.AdamW(parameters)
        handle = offload(optimizer, stride=0, size=3 * width**2)
        predicted = handle.host_bytes
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert peak.most == pytest.approx(predicted, rel=0.1)
    assert handle.host_bytes == predicted


def test_the_schedule_of_an_update() -> None:
    """PCIe 4 and a usual host: some sub-groups on the device take a third off."""
    rates = UpdateRates(host=2e9, device=60e9, up=25e9, down=25e9)
    times = {k: update_seconds(2e9, rates, k) for k in (0, 1, 2, 3, 4)}
    assert times[0] == pytest.approx(2e9 / 2e9 + 2 * 2e9 / 20 / 25e9)
    assert best_stride(rates) in (2, 3)
    assert 1.3 < times[0] / times[best_stride(rates)] < 2
    spans = list(update_spans(2e9, rates, 2))
    for stream in ("host", "device", "up", "down"):
        own = sorted((s.start, s.end) for s in spans if s.stream == stream)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))


def test_rates_can_be_measured() -> None:
    rates = measured_rates(torch.device("cpu"))
    assert min(rates.host, rates.device, rates.up, rates.down) > 0
