"""What matmuls cost on a machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What matmuls cost on a machine: FLOP/s, bytes/s, and the seconds of a call.

    ``rates`` are pairs of a dtype and its FLOP/s at each of ``rows`` input rows. Ranks that are
    multiples of ``rank_multiple`` suit its matrix units.
    """

    name: str
    rows: tuple[int, ...]
    rates: tuple[tuple[str, tuple[float, ...]], ...]
    bandwidth: float
    launch: float
    rank_multiple: int = 1

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.bandwidth / 1e9:.3g} GB/s, {1e6 * self.launch:.3g} µs a call"]
        for dtype, rates in self.rates:
            known = zip(self.rows, rates, strict=True)
            each = ", ".join(f"{rate / 1e9:.4g} at {rows}" for rows, rate in known)
            lines.append(f"{dtype}: GFLOP/s at so many rows: {each}")
        return "\n".join(lines)


GENERIC = Machine(
    "one core of a usual processor",
    (1, 16, 256),
    (("float32", (1.5e10, 3e10, 6e10)), ("bfloat16", (2e10, 6e10, 2e11))),
    bandwidth=2e10,
    launch=3e-6,
)
