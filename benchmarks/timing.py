"""Times of several calls side by side, in turn over many rounds: all meet the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SHORTEST = 2e-3
"""Seconds that one sample takes at least: far above what the clocks resolve."""


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
        """The ratio of wall times, round by round: what slows a whole round does not count."""
        return statistics.median(a / b for a, b in zip(self.walls, other.walls, strict=True))


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = 31) -> dict[str, Times]:
    """The times of every call; one sample of it is as many repeats as ``SHORTEST`` needs."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_sample(call, repeats[name]))
    return {name: Times(*zip(*found, strict=True)) for name, found in samples.items()}


def _repeats(call: Callable[[], object]) -> int:
    call()  # what is made on the first call is not timed
    count = 1
    while count * _sample(call, count)[0] < SHORTEST:
        count *= 2
    return count


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats
