"""The weight as it is."""

from __future__ import annotations

from tensorize.formats.format import Format
from tensorize.ir.spec import DENSE, Spec


class Dense(Format[Spec]):
    """No cores: a weight that keeps its parameter has no spec."""

    name = DENSE
    title = "dense"
    colors = "#b45309", "#fdf0dc"
    unasked = True


def is_dense(format: str) -> bool:
    """Whether what a report calls this was left dense."""
    return format == DENSE
