"""What goes back from a part of a model to the one before: gradients, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tensorize.passes.layers.chain import Part
from tensorize.passes.layers.work import Work


def keep_gradient(work: Work, name: str, part: Part) -> None:
    """Keep the gradient at what arrived at a part in its last backward pass."""
    arrived, part.entry.gradient = part.entry.gradient, None
    assert arrived is not None
    work.put(name, gradient=arrived)


def towards(work: Work, name: str) -> Callable[[Any], Tensor]:
    """Makes a scalar of what a part gives, whose gradient there is the one that was kept."""

    def probe(result: Tensor) -> Tensor:
        return (result * work.get(name)["gradient"].to(result.device)).sum()

    return probe


def has_all(work: Work, names: Sequence[str]) -> bool:
    return all(map(work.has, names))


def drop_all(work: Work, names: Sequence[str]) -> None:
    for name in names:
        work.drop(name)
