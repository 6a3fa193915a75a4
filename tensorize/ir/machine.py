"""What matmuls cost on a machine: the roofline.

A matmul of B rows costs a call, and then the larger of its FLOPs at the rate of that many rows and
its bytes at the machine's bandwidth (Williams, Waterman & Patterson 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorize.base import printer

_BYTES = {"complex128": 16, "complex64": 8, "float64": 8, "float32": 4, "int8": 1}


@dataclass(frozen=True)
class Machine:
    """What matmuls cost on a machine: FLOP/s, bytes/s, and the seconds of a call.

    ``rates`` are pairs of a dtype and its FLOP/s at each of ``rows`` input rows. Ranks that are
    multiples of ``rank_multiple`` suit its matrix units. ``by_index``: the seconds in which an
    element is read by its index and written to memory that was not in use, at many rows.
    """

    name: str
    rows: tuple[int, ...]
    rates: tuple[tuple[str, tuple[float, ...]], ...]
    bandwidth: float
    launch: float
    rank_multiple: int = 1
    by_index: float = 0.8e-9

    @property
    def reads_orders(self) -> bool:
        """Whether what runs on it can read columns in an order: the kernels for a GPU cannot."""
        return self.rank_multiple == 1

    @property
    def multiplies_integers(self) -> bool:
        """Whether weights of eight bits are multiplied as integers: on a CPU."""
        return self.rank_multiple == 1

    def __str__(self) -> str:
        call = printer.seconds(self.launch)
        lines = [f"{self.name}: {self.bandwidth / 1e9:.3g} GB/s, {call} a call"]
        for dtype, rates in self.rates:
            known = zip(self.rows, rates, strict=True)
            each = ", ".join(f"{rate / 1e9:.4g} at {rows}" for rows, rate in known)
            lines.append(f"{dtype}: GFLOP/s at so many rows: {each}")
        lines.append(f"an element by its index: {printer.seconds(self.by_index)}")
        return printer.plain("\n".join(lines))


GENERIC = Machine(
    "one core of a usual processor",
    (1, 16, 256),
    (
        ("float32", (1.5e10, 3e10, 6e10)),
        ("bfloat16", (2e10, 6e10, 2e11)),
        ("int8", (3e10, 7e10, 2.5e11)),
    ),
    bandwidth=2e10,
    launch=3e-6,
)


def bytes_of(dtype: str) -> int:
    """Of one element."""
    return _BYTES.get(dtype, 2)


def matmul_time(
    machine: Machine, rows: Any, inner: Any, columns: Any, dtype: str, *, stacked: Any = 1
) -> Any:
    """Microseconds of (rows, inner) @ (inner, columns); arrays of sizes give an array.

    ``stacked``: how many of them one batched call does.
    """
    size = bytes_of(dtype)
    moved = stacked * size * (rows * inner + inner * columns + rows * columns)
    flops = 2.0 * stacked * rows * inner * columns
    work = np.maximum(flops / _rate(machine, rows, dtype), moved / machine.bandwidth)
    return 1e6 * (machine.launch + work)


def _rate(machine: Machine, rows: Any, dtype: str) -> Any:
    if dtype.startswith("complex"):  # four products of real numbers
        real = "float64" if bytes_of(dtype) > 8 else "float32"
        return _rate(machine, rows, real) / 4
    rates = dict(machine.rates)
    # float16 is as fast as bfloat16, and int8 where it was not measured; float64 half as float32.
    known = rates.get(dtype) or rates["bfloat16" if bytes_of(dtype) <= 2 else "float32"]
    found = np.exp(np.interp(np.log(rows), np.log(machine.rows), np.log(known)))
    return found / 2 if dtype == "float64" else found


def lookup_time(machine: Machine, rows: Any, width: Any, dtype: str) -> Any:
    """Microseconds of rows copied out of a table: read and written."""
    moved = 2 * bytes_of(dtype) * rows * width
    return 1e6 * (machine.launch + moved / machine.bandwidth)
