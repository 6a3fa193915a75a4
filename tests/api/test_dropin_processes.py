"""The result of ``compile`` trains in two processes like any other module."""

from __future__ import annotations

import gc
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.api.mixed_model import WIDTH, WORDS, close, gradients, loss, scores, small, words
from tests.models import relative


def ddp(ids: Tensor, mine: Tensor, pivoted: bool) -> None:
    wrapped = nn.parallel.DistributedDataParallel(small(pivoted))
    loss(wrapped, mine).backward()
    got = {name: p.grad for name, p in wrapped.module.named_parameters()}
    close(got, gradients(small(pivoted), ids))  # type: ignore[arg-type]


def fsdp2(ids: Tensor, mine: Tensor, pivoted: bool) -> None:
    result, alone = small(pivoted), small(pivoted)
    for part in (result.words, result.attention, result.chain, result.head.first, result.head):
        fully_shard(part)
    fully_shard(result)
    assert all(isinstance(p, DTensor) for p in result.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (result, alone)]
    for _ in range(2):
        loss(result, mine).backward()
        loss(alone, ids).backward()
        got = {name: p.grad.full_tensor() for name, p in result.named_parameters()}
        close(got, {name: p.grad for name, p in alone.named_parameters()}, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def tensor_parallel(ids: Tensor, mine: Tensor) -> None:
    result = small()
    linears = {"head.first": ColwiseParallel(), "head.second": RowwiseParallel()}
    parallelize_module(result, init_device_mesh("cpu", (2,)), linears)
    (rank,) = result.head.spec.ranks
    stored = WIDTH - rank * result.head.spec.pivoted
    assert result.head.first.weight.to_local().shape == (rank // 2, stored)
    assert result.head.second.weight.to_local().shape == (WORDS, rank // 2)
    assert relative(result(ids).detach(), scores(small(), ids)) < 1e-6
    loss(result, ids).backward()
    want = gradients(small(), ids)["head.first.weight"]
    assert relative(result.head.first.weight.grad.full_tensor(), want) < 1e-5


def _process(rank: int, meeting: str) -> None:
    warnings.simplefilter("error")
    # FSDP2 says so of any linear with a bias on a CPU.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        ids = words(4)
        mine = ids[2 * rank : 2 * rank + 2]
        both = (partial(check, pivoted=form) for check in (ddp, fsdp2) for form in (False, True))
        for check in (*both, tensor_parallel):
            check(ids, mine)
            gc.collect()  # what holds a process group goes before it does
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_fsdp2_and_tensor_parallel(tmp_path: Path) -> None:
    meeting = (tmp_path / "meeting").as_uri()
    torch.multiprocessing.spawn(_process, (meeting,), nprocs=2)
