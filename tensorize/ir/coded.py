"""Specs of weights whose entries are integers of a few bits, and of a matrix as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorize.ir.precision import FLOAT, INPUTS, INTEGERS, ONE_DIGIT, Precision
from tensorize.ir.spec import DENSE, Index, Spec


@dataclass(frozen=True)
class DenseSpec(Spec):
    """A weight as it is: one core. It is the inside of what is quantized; else there is no spec."""

    shape: tuple[int, ...]
    format = DENSE
    ranks = ()

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        return (self.shape,)

    @property
    def batch(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("e",) if len(self.shape) > 2 else ()

    @property
    def single(self) -> DenseSpec:  # type: ignore[override]
        return DenseSpec(self.shape[-2:])

    def to_dict(self) -> dict[str, Any]:
        return {"format": DENSE, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DenseSpec:
        return cls(tuple(data["shape"]))

    def __repr__(self) -> str:
        return f"DenseSpec({self.shape})"


@dataclass(frozen=True)
class QuantizedSpec(Spec):
    """A weight whose entries are integers of a few bits: ``inner`` says what these stand for.

    Every core of ``inner`` is a matrix, or a stack of them. What trains are the scales (M, groups),
    which are the cores here; after them come, for every core, the packed codes and the zero points,
    where there are any. ``inputs`` says what its inputs are rounded to, of ``INPUTS``: where it is
    not "float", a CPU multiplies integers, for which it keeps fewer than eight bits as eight.

    Raises:
        ValueError: there is no such precision, or the inside is quantized itself.
    """

    inner: Spec
    precision: str  # pyright: ignore[reportIncompatibleVariableOverride]
    inputs: str = ONE_DIGIT

    if TYPE_CHECKING:
        format: str = field(init=False, compare=False)
        shape: tuple[int, ...] = field(init=False, compare=False)
        core_shapes: tuple[tuple[int, ...], ...] = field(init=False, compare=False)
        indices: tuple[Index, ...] = field(init=False, compare=False)
        ranks: tuple[int, ...] = field(init=False, compare=False)
        batch: tuple[str, ...] = field(init=False, compare=False)
        single: QuantizedSpec = field(init=False, compare=False)
        text: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in INTEGERS or self.inner.precision is not None:
            raise ValueError(f"no {self.precision!r} of {self.inner}")
        if self.inputs not in INPUTS:
            raise ValueError(f"{self.inner} has inputs in {self.inputs!r}")
        kind, shapes = self.kind, self.inner.core_shapes
        indices: list[Index] = list(self.inner.indices)
        for k, (*lead, columns) in enumerate(shapes):
            packed = (*lead, kind.packed(columns))
            indices.append(Index(f"codes_{k}", packed, kind.dtype))
            if kind.offset:
                groups = (*lead, kind.packed(kind.groups(columns)))
                indices.append(Index(f"zeros_{k}", groups, "uint8"))
        scales = tuple((*lead, kind.groups(columns)) for *lead, columns in shapes)
        for name, value in (
            *((each, getattr(self.inner, each)) for each in ("format", "shape", "ranks", "batch")),
            ("core_shapes", scales),
            ("indices", tuple(indices)),
            ("text", json.dumps(self.to_dict())),  # by which graphs hold it
        ):
            object.__setattr__(self, name, value)
        one = self.inner.single
        single = QuantizedSpec(one, self.precision, self.inputs) if self.batch else self
        object.__setattr__(self, "single", single)

    @property
    def kind(self) -> Precision:
        """What the precision is."""
        return INTEGERS[self.precision]

    @property
    def plain(self) -> Any:
        return self.inner.plain

    @property
    def parameters(self) -> int:
        """The numbers that the codes stand for."""
        return self.inner.parameters

    def bytes(self, itemsize: int, holders: int = 1) -> int:
        scales = sum(math.prod(shape) for shape in self.core_shapes)
        return scales * itemsize + holders * sum(index.bytes for index in self.indices)

    def packed_bytes(self, contracts: Collection[str]) -> int:
        """Codes of eight bits and a scale a row, where products of integers need them: those of
        eight bits are what meets the columns already."""
        if self.inputs == FLOAT or self.batch:
            return 0
        sides = [] if self.kind.bits == 8 or "columns" not in contracts else [0]
        sides += [1] if "rows" in contracts else []
        shapes = self.inner.core_shapes
        return sum(math.prod(shape) + 4 * shape[side] for side in sides for shape in shapes)

    def with_ranks(self, ranks: Sequence[int]) -> QuantizedSpec:
        return QuantizedSpec(self.inner.with_ranks(ranks), self.precision, self.inputs)

    def to_dict(self) -> dict[str, Any]:
        inputs = {} if self.inputs == ONE_DIGIT else {"inputs": self.inputs}
        return {**self.inner.to_dict(), "precision": self.precision, **inputs}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizedSpec:
        """Raises ValueError for what is no precision of this release."""
        inside = {k: value for k, value in data.items() if k not in ("precision", "inputs")}
        return cls(Spec.from_dict(inside), data["precision"], data.get("inputs", ONE_DIGIT))

    def __repr__(self) -> str:
        inputs = "" if self.inputs == ONE_DIGIT else f", inputs={self.inputs!r}"
        return f"QuantizedSpec({self.inner}, {self.precision!r}{inputs})"


def from_dict(data: Mapping[str, Any]) -> Spec:
    """The spec that ``to_dict`` of one of these wrote."""
    return (DenseSpec if data.get("precision") is None else QuantizedSpec).from_dict(data)
