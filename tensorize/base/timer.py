"""How long calls take: one by itself, several in turn, one that finds nothing in a GPU's cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]

_ROUNDS = 5
_SHORTEST = 2e-3
"""Seconds of a round, by itself."""
_TURNS, _LEAST_TURNS, _SECONDS = 30, 5, 0.5
"""Rounds of calls in turn: at most, at least, and for how many seconds a call between these."""
_COLD_ROUNDS, _AHEAD = 15, 500_000
"""Cycles of the GPU that the processor has to make a call in, a quarter of a millisecond."""


def seconds_of(call: Call, device: str, rounds: int = _ROUNDS) -> float:
    """Seconds of a call: the median of some rounds of at least a few milliseconds.

    With one thread they are those of the processor: what another process takes is not the call's.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    count = 1
    while count * _sample(call, device, count, clock) < _SHORTEST:
        count *= 2
    return statistics.median(_sample(call, device, count, clock) for _ in range(rounds))


def seconds_in_turn(calls: Sequence[Call], device: str) -> list[float]:
    """Seconds of each of several calls, the medians of some rounds.

    Each round takes one after the other, so that whatever else the machine does hits all.
    """
    found: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for turn in range(_TURNS + 1):
        if turn > _LEAST_TURNS and time.perf_counter() - began > _SECONDS * len(calls):
            break
        for step in range(len(calls)):
            k = (turn + step) % len(calls)  # none always follows the same one
            seconds = _sample(calls[k], device)
            if turn:  # the first round warms up
                found[k].append(seconds)
    return [statistics.median(seconds) for seconds in found]


def cold_seconds_of(call: Call, flush: Tensor) -> float:
    """Seconds on the GPU of a call that finds nothing in its cache: the median of some rounds.

    ``flush``: a tensor on that GPU, larger than the cache, which is written to before each.
    """
    for _ in range(3):
        call()
    samples = []
    for _ in range(_COLD_ROUNDS):
        flush.zero_()
        torch.cuda._sleep(_AHEAD)  # so that the call is there before the start is
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e-3 * start.elapsed_time(end))
    return statistics.median(samples)


def _sample(
    call: Call, device: str, count: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    _synchronize(device)
    start = clock()
    for _ in range(count):
        call()
    _synchronize(device)
    return (clock() - start) / count


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
