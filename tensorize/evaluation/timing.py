"""How long models take, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.ir.sites import Batch

_ROUNDS, _LEAST_ROUNDS, _SECONDS = 30, 5, 0.5


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch: of every tensor with as many entries as the first tensor."""
    tensors = [t for t in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if _has_samples(t)]
    if not tensors:
        return batch
    count = len(tensors[0])

    def cut(value: Any) -> Any:
        return value[:1] if _has_samples(value) and len(value) == count else value

    args, kwargs = pytree.tree_map(cut, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, kwargs or args)


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def times(models: Sequence[nn.Module], batch: Batch) -> list[float]:
    """Seconds of a call of each model, the medians of some rounds.

    Each round takes one model after the other, so that whatever else the machine does hits all.
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    found: list[list[float]] = [[] for _ in models]
    began = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        enough = turn > _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS * len(models)
        if enough:
            break
        for step in range(len(models)):
            k = (turn + step) % len(models)  # no model always follows the same one
            _synchronize(device)
            start = time.perf_counter()
            models[k](*batch.args, **batch.kwargs)
            _synchronize(device)
            if turn:  # the first round warms up
                found[k].append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
