"""What a model is at each budget, as examples show it: one figure of its own, and what is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorize.base.printer import count, interval, number, percent, table


@dataclass(frozen=True)
class Row:
    """A model at one budget (None: dense): how good it is, by a figure of the example's own; what
    it lost to the dense model, and where that was predicted to be (90 %)."""

    budget: float | None
    parameters: int
    own: float
    lost: float = 0.0
    predicted: tuple[float, float] | None = None

    @property
    def inside(self) -> bool:
        """Whether what it lost is where it was predicted to be."""
        return self.predicted is None or self.predicted[0] <= self.lost <= self.predicted[1]


def shown(
    rows: Sequence[Row], own: str, lost: str, written: Callable[[float], str] = number
) -> str:
    """The rows as a table; ``own`` and ``lost`` head the two figures."""
    body = [
        (
            "dense" if row.budget is None else percent(row.budget),
            count(row.parameters),
            written(row.own),
            "–" if row.predicted is None else f"{number(row.lost)} ({interval(row.predicted)})",
        )
        for row in rows
    ]
    return table(("model", "parameters", own, f"{lost} (predicted)"), body)
