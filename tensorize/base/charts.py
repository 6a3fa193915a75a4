"""Scales and ticks of the charts on pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The drawing area of the curve inside its picture, in the picture's own units.
LEFT, RIGHT, TOP, BOTTOM = 92.0, 736.0, 44.0, 330.0


@dataclass(frozen=True)
class Scale:
    """Where a budget and a quality lie in a picture; the quality's axis is logarithmic."""

    budget: float
    low: float
    high: float
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = BOTTOM

    def x(self, budget: float) -> float:
        inside = min(1.0, max(0.0, budget / self.budget))
        return round(self.left + (self.right - self.left) * inside, 1)

    def y(self, quality: float) -> float:
        inside = math.log10(min(self.high, max(self.low, quality)) / self.low)
        height = (self.bottom - self.top) / math.log10(self.high / self.low)
        return round(self.bottom - height * inside, 1)


def budget_steps(widest: float) -> tuple[float, float]:
    """The distance of the ticks of an axis of budgets up to ``widest``, and where it ends."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if widest / s <= 6)
    return step, step * math.ceil(widest / step - 1e-9)


def budget_ticks(scale: Scale, step: float) -> list[tuple[float, str]]:
    """Position and text of the ticks of an axis of budgets."""
    count = round(scale.budget / step)
    return [(scale.x(k * step), f"{100 * k * step:g} %") for k in range(count + 1)]


def log_ends(low: float, high: float) -> tuple[float, float]:
    """The round values (1, 2 or 5 of a decade) around a range, at least a decade apart."""
    steps = [digit * 10.0**power for power in range(-300, 300) for digit in (1, 2, 5)]
    above = min(step for step in steps if step >= max(high, 10 * steps[0]) * (1 - 1e-9))
    low = min(max(low, steps[0]), above / 10)
    return max(step for step in steps if step <= low * (1 + 1e-9)), above


def log_ticks(scale: Scale) -> list[tuple[float, str, bool]]:
    """Position, text and whether it is a whole decade; between decades only where they are few."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    digits = (1, 2, 5) if scale.high / scale.low < 200 else (1,)
    ticks: list[tuple[float, str, bool]] = []
    for power in range(first, last + 1, max(1, (last - first) // 7)):
        for value in (digit * 10.0**power for digit in digits):
            if scale.low * 0.999 < value < scale.high * 1.001:
                text = f"{value:g}" if value > 0.9e-3 else f"{value:.0e}".replace("e-0", "e-")
                ticks.append((scale.y(value), text, value == 10.0**power))
    return ticks
