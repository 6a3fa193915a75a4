"""What matmuls cost on this machine: measured once and kept, or known figures until then.

``measure`` takes some seconds; ``tensorize calibrate`` keeps what it finds for this machine, number
of threads and version of torch under ``~/.cache/tensorize`` (or ``TENSORIZE_CACHE_DIR``), and from
then on every plan is made for that. Nothing is timed unless asked for: plans are deterministic.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from tensorize.base import files, timer
from tensorize.base.records import plain, record
from tensorize.formats.order import in_order
from tensorize.ir.machine import GENERIC, Machine

_ROWS = (1, 16, 256, 1024)
_DTYPES = ("float32", "bfloat16")
_WIDTH = 2048
_WIDE = 8192  # a weight of this side is in no cache: reading it is what one row costs

# FLOP/s of float32 (without TF32) and bfloat16, bytes/s: the makers' figures, of which large
# matmuls reach about two thirds.
_GPUS = {
    "B200": (80e12, 2250e12, 8.0e12),
    "H200": (67e12, 989e12, 4.8e12),
    "H100": (67e12, 989e12, 3.35e12),
    "A100": (19.5e12, 312e12, 2.0e12),
    "L40S": (91.6e12, 362e12, 0.86e12),
    "RTX 4090": (82.6e12, 165e12, 1.01e12),
    "MI300X": (163e12, 1307e12, 5.3e12),
    "MI250X": (48e12, 383e12, 3.2e12),
}
_OF_A_PROCESSOR = (0.18e12, 2.9e12, 18e9)
"""The same for each multiprocessor of a GPU that is not named: an A100's."""
_REACHED, _GPU_LAUNCH, _GPU_MULTIPLE = 2 / 3, 5e-6, 8


def identity(device: str = "cpu") -> str:
    """The machine's name: its processor and threads, or its GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def current(device: str = "cpu") -> Machine:
    """What is known of the machine: measured before, or the figures of its kind."""
    path = place(device)
    try:
        return record(Machine, json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return known(device)


def known(device: str = "cpu") -> Machine:
    """Figures of a named GPU, of another one by its size, or of a usual core for each thread."""
    name = identity(device)
    if device.startswith("cuda"):
        known = next((figures for part, figures in _GPUS.items() if part in name), None)
        if known is not None:
            return _gpu(f"{name} (known)", *known)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        guessed = (count * figure for figure in _OF_A_PROCESSOR)
        return _gpu(f"{name} (not known: run `tensorize calibrate` on it)", *guessed)
    threads = torch.get_num_threads()
    rates = tuple((dtype, tuple(rate * threads for rate in r)) for dtype, r in GENERIC.rates)
    return replace(GENERIC, name=f"{name} (not calibrated)", rates=rates)


def _gpu(name: str, single: float, half: float, bandwidth: float) -> Machine:
    rates = (("float32", (_REACHED * single,)), ("bfloat16", (_REACHED * half,)))
    return Machine(name, (1,), rates, _REACHED * bandwidth, _GPU_LAUNCH, _GPU_MULTIPLE)


def place(device: str = "cpu") -> Path:
    """Where the measured figures of this machine are kept."""
    return files.of_this_machine("machine", f"{identity(device)} {torch.__version__}")


def keep(machine: Machine, device: str = "cpu") -> Path:
    """Write measured figures to where ``current`` looks for them."""
    path = place(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_at_once(path, json.dumps(plain(machine), indent=1))
    return path


@torch.no_grad()
def measure(device: str = "cpu") -> Machine:
    """Time calls, matmuls of several numbers of rows, one row against a weight in no cache, columns
    in another order."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        found = torch.randn(shape, generator=generator, device=device)
        return (found if dtype.is_floating_point else 32 * found).to(dtype)

    def seconds(weight: torch.Tensor, rows: int) -> float:
        x = draw(rows, weight.shape[1], dtype=weight.dtype)
        run = partial(linear, x, weight)
        if not weight.is_floating_point():
            run = partial(torch._int_mm, x, weight.t())  # pyright: ignore[reportPrivateImportUsage]
        return timer.seconds_of(run, device)

    launch = seconds(draw(8, 8), 1)
    rates = []
    for name in (*_DTYPES, *(("int8",) if device == "cpu" else ())):
        weight = draw(_WIDTH, _WIDTH, dtype=getattr(torch, name))
        took = [max(seconds(weight, rows) - launch, 1e-9) for rows in _ROWS]
        found = (2 * n * _WIDTH**2 / t for n, t in zip(_ROWS, took, strict=True))
        rates.append((name, tuple(found)))
    wide = draw(_WIDE, _WIDE)
    bandwidth = 4 * _WIDE**2 / seconds(wide, 1)
    order = torch.randperm(_WIDTH, generator=generator, device=device).int()
    x = draw(_WIDTH, _WIDTH)
    by_index = timer.seconds_of(lambda: in_order(x, order), device) / x.numel()
    multiple = 1 if device == "cpu" else _GPU_MULTIPLE
    return Machine(identity(device), _ROWS, tuple(rates), bandwidth, launch, multiple, by_index)
