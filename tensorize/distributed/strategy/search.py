"""Every strategy that a model, a batch and so many devices allow, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tensorize.base import printer
from tensorize.distributed.strategy.estimate import ROOM, Estimate, Estimator
from tensorize.distributed.strategy.strategy import (
    BTP,
    INPUTS,
    KEEP,
    MEGATRON,
    NAIVE,
    PLAIN,
    PRODUCTS,
    Strategy,
)
from tensorize.distributed.strategy.workload import Workload


@dataclass(frozen=True)
class Found:
    """The estimates of a search by growing time, those that fit; and what did not.

    ``refused`` says of numbers of tensor-parallel devices, and of meshes, why there is none.
    """

    fitting: tuple[Estimate, ...]
    leanest: Estimate | None
    refused: dict[str, str]


def divisors(n: int) -> list[int]:
    small = [k for k in range(1, int(n**0.5) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def layouts(workload: Workload, devices: int, batch: int) -> Iterator[Strategy]:
    """Meshes and styles, with one sequence a micro-batch."""
    kinds = tuple(dict.fromkeys(workload.layers))
    for tp in divisors(devices):
        if any(layer.parts(tp) for layer in kinds) or workload.head.outputs % tp:
            continue
        for pp in divisors(devices // tp):
            dp = devices // tp // pp
            if pp > len(workload.layers) or batch % dp:
                continue
            for style in styles_of(workload, tp):
                yield Strategy(pp, dp, tp, style, 1, batch // dp)


def styles_of(workload: Workload, tp: int) -> tuple[str, ...]:
    """How so many devices may share the layers."""
    if tp == 1:
        return (PLAIN,)
    return (BTP, NAIVE) if workload.compressed else (MEGATRON,)


def variants(workload: Workload, layout: Strategy, host: bool) -> Iterator[Strategy]:
    """Micro-batches, checkpointing, sharding and offload of a mesh; larger micro-batches later.

    ``host``: there is one beside the device, which may hold states.
    """
    sequences = layout.rows * layout.micro
    checkpoints = (KEEP, PRODUCTS, INPUTS) if workload.compressed else (KEEP, INPUTS)
    for checkpoint in checkpoints:
        for sharded in (False, True) if layout.dp > 1 else (False,):
            for offload in (False, True) if host else (False,):
                how = replace(layout, checkpoint=checkpoint, sharded=sharded, offload=offload)
                for rows in divisors(sequences):
                    yield replace(how, rows=rows, micro=sequences // rows)


def search(estimator: Estimator, devices: int, batch: int) -> Found:
    """The best strategy and all others that fit.

    What a device holds grows with the micro-batch, so that once one does not fit none that is
    larger is looked at.
    """
    workload, room = estimator.workload, ROOM * estimator.cluster.memory
    fitting: list[Estimate] = []
    leanest: tuple[float, Strategy] | None = None
    too_large: set[Strategy] = set()
    refused = {
        f"tp {tp}": why
        for tp in divisors(devices)
        if (why := next(filter(None, (each.parts(tp) for each in estimator.over.unlike)), None))
    }
    for layout in layouts(workload, devices, batch):
        least, before = math.inf, len(fitting)
        for strategy in variants(workload, layout, not estimator.cluster.is_processor):
            how = replace(strategy, rows=1, micro=1)
            if how in too_large:
                continue
            held = sum(estimator.memory(strategy).values())
            least = min(least, held)
            if leanest is None or held < leanest[0]:
                leanest = held, strategy
            if held > room:
                too_large.add(how)
            else:
                fitting.append(estimator(strategy))
        if len(fitting) == before:
            why = f"needs {printer.bytes_(least)} of {printer.bytes_(room)} at the least"
            refused[layout.mesh] = why
    fitting.sort(key=lambda found: (found.total, found.strategy))
    return Found(tuple(fitting), None if leanest is None else estimator(leanest[1]), refused)
