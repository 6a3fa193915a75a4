"""How much energy is used: what the counters of processors and GPUs say, where they can be read.

They count all that a machine does, whoever asked for it. Where there are none nothing is guessed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_SHORTEST = 0.5
"""Seconds of which the energy is told: counters move a few hundred times in them."""

Counter = Callable[[], float]


class Meter:
    """Joules that the machine has used since it was made."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._before = [counter() for counter in counters]

    def read(self) -> float:
        """So many. A counter begins again after some minutes: it is to be read before that."""
        pairs = zip(self._counters, self._before, strict=True)
        return sum(counter() - start for counter, start in pairs)


def meter(device: str, root: Path = POWERCAP) -> Meter | None:
    """One of the counters of a device, None where none can be read.

    On a CPU those of its packages (RAPL), on an NVIDIA GPU those of the board.
    """
    counters = _of_gpu(device) if device.startswith("cuda") else _of_packages(root)
    return Meter(counters) if counters else None


def joules_of(call: Callable[[], object], device: str, root: Path = POWERCAP) -> float | None:
    """Joules of a call, a mean over half a second of them; None where no counter can be read."""
    used = meter(device, root)
    if used is None:
        return None
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < _SHORTEST:
        call()
        count += 1
    return used.read() / count


def _of_packages(root: Path) -> list[Counter]:
    """The counters of all packages that may be read: one a socket, without what is within it."""
    found: list[Counter] = []
    for file in sorted(root.glob("*-rapl:[0-9]*/energy_uj")):
        if file.parent.name.count(":") > 1:
            continue  # a part of a package
        try:
            found.append(_rising(file, float((file.parent / "max_energy_range_uj").read_text())))
            found[-1]()
        except OSError:  # only the administrator may
            return []
    return found


def _rising(file: Path, wraps: float) -> Counter:
    """A counter in joules that goes on where its file begins again."""
    last, turns = float(file.read_text()), 0

    def read() -> float:
        nonlocal last, turns
        now = float(file.read_text())
        turns, last = turns + (now < last), now
        return 1e-6 * (turns * wraps + now)

    return read


def _of_gpu(device: str) -> list[Counter]:
    """The counter of a board, through NVIDIA's own library."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        number = int(device.partition(":")[2] or 0)
        board = nvml.nvmlDeviceGetHandleByIndex(number)
        nvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except nvml.NVMLError:
        return []
    return [lambda: 1e-3 * nvml.nvmlDeviceGetTotalEnergyConsumption(board)]
