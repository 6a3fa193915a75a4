"""A running group of processes measured as a planner's cluster.

A collective is a latency and then its bytes at a bandwidth (the alpha-beta model, Hockney 1994):
both are fitted to sums of sizes from small to large. All processes measure at the same time, as
they compute at the same time; of each figure the slowest process's counts.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tensorize.base import timer
from tensorize.base.errors import TensorizeError
from tensorize.distributed.strategy.cluster import Cluster
from tensorize.distributed.strategy.probe import Eager, eager_figures

_SIZES = {"cpu": range(12, 23), "cuda": range(14, 27)}
"""Bytes of the sums, as powers of two: 4 KB to 4 MB, and to 64 MB on GPUs."""
_ROUNDS = 9
_TURNS = 6
"""Products that a collective stands between, at a time."""
_ROWS = 1024
_THIN = (16, 64, 256, 1024)
_COPIED = 2**27
_UPDATED = 2**22


def measure(device: str = "cpu") -> Cluster:
    """The cluster of the running process group; every process has to call it.

    Args:
        device: ``"cpu"``, which computes in float32, or ``"cuda"``, in bfloat16.

    Raises:
        TensorizeError: no group of several processes runs.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise TensorizeError(
            "collectives are measured between processes, and no group of several runs",
            way_out="torchrun --nproc-per-node 2 -m tensorize.cli calibrate --distributed",
        )
    count = dist.get_world_size()
    node = min(count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inner = dist.new_subgroups(node)[0] if node < count else dist.group.WORLD
    latency, link = alpha_beta(*_sums(inner, device), node) if node > 1 else (0.0, math.inf)
    network = link
    if node < count:
        latency, rate = alpha_beta(*_sums(dist.group.WORLD, device), count)
        network = rate / node
        link = rate if math.isinf(link) else link
    widest, rates = _products(device, dtype)
    peak, thin = saturation(widest, rates)
    copied = _copies(device)
    figures = [latency, *(-x for x in (link, network, peak, copied, _updates(), _to_host(device)))]
    slowest = _slowest([*figures, thin], device)
    latency, *negative, thin = slowest
    link, network, peak, copied, updates, host = (-x for x in negative)
    found = Cluster(
        name=f"{count} processes measured, {device}",
        peak=peak,
        memory=_memory(device, node),
        bandwidth=copied,
        node=node,
        link=link,
        network=network,
        host=host,
        updates=updates,
        best=1.0,
        thin=thin,
        links=1.0,
        passes=1.0,
        latency=latency,
        itemsize=dtype.itemsize,
    )
    if device != "cpu":
        return found
    own = eager_figures(found, lambda call: _wall(call, device))
    slowness, eager, start = _slowest([1 / own.attention, own.eager, own.start], device)
    return replace(found, **asdict(Eager(1 / slowness, eager, start)), updated=updates)


def _slowest(figures: Sequence[float], device: str) -> list[float]:
    """The largest of all processes, of each figure."""
    found = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def alpha_beta(
    sizes: Sequence[float], seconds: Sequence[float], members: int
) -> tuple[float, float]:
    """Latency of one step, and bytes a second, that give the seconds of sums of so many bytes.

    A sum takes latency · log2(members) + 2 (members - 1) / members · bytes / rate; the errors are
    relative ones, in least squares.
    """
    lines = torch.tensor([[1.0, size] for size in sizes], dtype=torch.float64)
    took = torch.tensor(seconds, dtype=torch.float64)
    start, each = torch.linalg.lstsq(
        lines / took[:, None], torch.ones_like(took)[:, None]
    ).solution[:, 0].tolist()  # fmt: skip
    if start < 0:  # bytes alone explain them
        start, each = 0.0, float((took / lines[:, 1]).median())
    moved = 2 * (members - 1) / members
    return start / math.log2(members), moved / max(each, 1e-15)


def saturation(widths: Sequence[int], rates: Sequence[float]) -> tuple[float, float]:
    """Peak and width of rates = peak (1 - exp(-width / thin)), by least squares of logs."""

    def missed(thin: float) -> tuple[float, float]:
        shares = [math.log(-math.expm1(-width / thin)) for width in widths]
        gaps = [math.log(rate) - share for rate, share in zip(rates, shares, strict=True)]
        peak = statistics.fmean(gaps)
        return sum((gap - peak) ** 2 for gap in gaps), math.exp(peak)

    thin = min((1.1**k for k in range(-10, 90)), key=lambda thin: missed(thin)[0])
    return missed(thin)[1], thin


def _sums(group: Any, device: str) -> tuple[list[float], list[float]]:
    """Bytes, and seconds of a sum of so many."""
    sizes, seconds = [float(2**k) for k in _SIZES[device]], []
    for size in sizes:
        x = torch.zeros(int(size) // 4, device=device)
        seconds.append(_among(lambda x=x: _summed(x, group), device))
    return sizes, seconds


def _summed(x: Tensor, group: Any) -> Tensor:
    """A sum as layers make it: into a tensor of its own."""
    name = group.group_name
    found = torch.ops._c10d_functional.all_reduce(x, "sum", name)
    return torch.ops._c10d_functional.wait_tensor(found)


def _among(call: Callable[[], object], device: str) -> float:
    """Seconds that a collective adds to products that it stands between, as in a step: processes
    come to it one after the other, and find the caches full of other things."""
    x = torch.randn(_ROWS // 4, _ROWS, device=device)
    weight = torch.randn(_ROWS, _ROWS, device=device)

    def products(then: Callable[[], object] = lambda: None) -> None:
        for _ in range(_TURNS):
            torch.nn.functional.linear(x, weight)
            then()

    # Products alone are taken anew every time: what the machine does meanwhile is in both.
    added = _wall(lambda: products(call), device) - _wall(products, device)
    return max(added, 0.0) / _TURNS


def _products(device: str, dtype: torch.dtype) -> tuple[tuple[int, ...], list[float]]:
    """FLOP/s of products by their thinnest side."""
    rates = []
    for thin in _THIN:
        x = torch.randn(_ROWS, thin, device=device, dtype=dtype)
        weight = torch.randn(_ROWS, thin, device=device, dtype=dtype)
        took = _wall(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device)
        rates.append(2 * _ROWS * _ROWS * thin / took)
    return _THIN, rates


def _copies(device: str) -> float:
    """Bytes read and written a second."""
    x = torch.zeros(_COPIED // 4, device=device)
    y = torch.empty_like(x)
    return 2 * _COPIED / _wall(lambda: y.copy_(x), device)


def _to_host(device: str) -> float:
    if device == "cpu":
        return _copies(device) / 2
    x = torch.zeros(_COPIED // 4, device=device)
    y = torch.empty(x.shape, pin_memory=True)
    return _COPIED / _wall(lambda: y.copy_(x), device)


def _updates() -> float:
    """Parameters that the host's AdamW, in one pass over them, updates a second."""
    parameter = torch.nn.Parameter(torch.zeros(_UPDATED))
    parameter.grad = torch.ones(_UPDATED)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return _UPDATED / _wall(optimizer.step, "cpu")


def _wall(call: Callable[[], object], device: str) -> float:
    """Seconds of a call by the clock, while the others of a group do the same."""
    dist.barrier()
    call()
    if device == "cpu":
        found = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return statistics.median(found)
    return timer.seconds_of(call, device)


def _memory(device: str, node: int) -> float:
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / node
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
