"""Times of several calls side by side, in turn over many rounds: all meet the same noise."""

from __future__ import annotations

import contextlib
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHORTEST = 2e-3
"""Seconds that one sample takes at least: far above what the clocks resolve."""

LONG, ENOUGH = 2.0, 60
"""Seconds of a call that none is done before a sample of any, and of all rounds together."""


@dataclass(frozen=True)
class Times:
    """Seconds a call, a sample for each round: on the clock, and of the processor (all threads)."""

    walls: tuple[float, ...]
    cpus: tuple[float, ...]

    @property
    def wall(self) -> float:
        return statistics.median(self.walls)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)

    def over(self, other: Times) -> float:
        """The ratio of times, round by round: what slows a whole round does not count.

        With one thread they are the processor's: what another process takes is not the call's.
        """
        alone = torch.get_num_threads() == 1
        own, others = (t.cpus if alone else t.walls for t in (self, other))
        return statistics.median(a / b for a, b in zip(own, others, strict=True))


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = 31) -> dict[str, Times]:
    """The times of every call; one sample of it is as many repeats as ``SHORTEST`` needs.

    Freed memory is kept by the process, as allocators for such work do it: else glibc gives a large
    result back or not as its heap happens to lie, and new pages for 256 rows of logits cost as much
    as a tenth of a compressed model.

    There are as many rounds as ``ENOUGH`` allows, three at least: a long call evens out by itself.
    """
    _keep_freed_memory()
    repeats = {name: _repeats(call) for name, call in calls.items()}
    warm = all(repeats.values())  # or none of them: what a first call pays is more for some
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order, draw, began = list(calls), random.Random(0), time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > ENOUGH:
            break
        draw.shuffle(order)  # so that none always comes after the same one
        for name in order:
            samples[name].append(_sample(calls[name], repeats[name], warm=warm))
    return {name: Times(*zip(*found, strict=True)) for name, found in samples.items()}


def _keep_freed_memory() -> None:
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another library than glibc
        libc = ctypes.CDLL("libc.so.6")
        for option in (trim_threshold, mmap_threshold):
            libc.mallopt(option, 2**30)


def _repeats(call: Callable[[], object]) -> int:
    """How many calls a sample is of; 0 where one takes so long that it is a sample by itself."""
    took = _sample(call, 1, warm=False)[0]
    if took >= LONG:
        return 0
    count = 1
    while count * _sample(call, count, warm=True)[0] < SHORTEST:
        count *= 2
    return count


def _sample(call: Callable[[], object], repeats: int, *, warm: bool) -> tuple[float, float]:
    if warm:
        call()  # what the one before left in the caches and took of the heap is not this one's
    count = max(repeats, 1)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
