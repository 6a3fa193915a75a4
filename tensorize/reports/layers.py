"""Weights folded by layer: a row a kind of weight, a column a layer.

The weights of a 7 B model are some 200; of kinds it has 9. ``templates/layers.html.j2`` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tensorize.base import printer
from tensorize.formats.dense import is_dense


class Weight(Protocol):
    """What is shown of a weight."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def share(self) -> float: ...
    @property
    def precision(self) -> str | None: ...


W = TypeVar("W", bound=Weight)


@dataclass(frozen=True)
class Kind(Generic[W]):
    """Weights of one name but for the layer; ``by_layer`` has a place for every layer there is."""

    name: str
    alone: W | None
    by_layer: tuple[W | None, ...]

    @property
    def weights(self) -> list[W]:
        return [weight for weight in (self.alone, *self.by_layer) if weight is not None]


@dataclass(frozen=True)
class Layers(Generic[W]):
    """``numbers`` of the layers; ``some_alone``: whether some weights are of no layer."""

    numbers: tuple[int, ...]
    kinds: tuple[Kind[W], ...]

    @property
    def prefix(self) -> str:
        """What the names of all kinds that have layers begin with: ``"model.layers.*."``."""
        parts = [kind.name.split(".")[:-1] for kind in self.kinds if kind.alone is None]
        shared = ""
        for part, *others in zip(*parts, strict=False):
            if any(other != part for other in others):
                break
            shared += f"{part}."
        return shared

    @property
    def some_alone(self) -> bool:
        return any(kind.alone is not None for kind in self.kinds)


def place(name: str) -> tuple[str, int | None]:
    """What kind of weight it is, and in which layer: its name with the first number taken out."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    kind = name.removesuffix(".weight")
    if found is None:
        return kind, None
    return kind[: found.start()] + "*" + kind[found.end() :], int(found[0])


def folded(weights: Sequence[W]) -> Layers[W]:
    """The weights by kind and layer, in the order of the model."""
    rows: dict[str, dict[int | None, W]] = {}
    for weight in weights:
        kind, layer = place(weight.name)
        rows.setdefault(kind, {})[layer] = weight
    numbers = sorted({layer for row in rows.values() for layer in row if layer is not None})
    kinds = (
        Kind(name, row.get(None), tuple(row.get(number) for number in numbers))
        for name, row in rows.items()
    )
    return Layers(tuple(numbers), tuple(kinds))


def label(weight: Weight) -> str:
    """What a cell has room for: the largest rank, else the bits, else that it is dense."""
    if weight.ranks:
        return str(max(weight.ranks))
    return weight.precision or ("d" if is_dense(weight.format) else "")


def hint(weight: Weight) -> str:
    """All of it, where somebody points at a cell."""
    what = printer.format_text(weight.format, weight.ranks, weight.precision)
    kept = "" if is_dense(weight.format) else f", {printer.percent(weight.share)} kept"
    return f"{weight.name}: {what}{kept}"
