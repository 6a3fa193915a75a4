"""Lines of a Triton kernel: tiles with named axes, their loads, stores and dots. Text only.

A tensor is an ``Operand``: its axes by name, with the stride of each. A tile is a run of
dimensions, each of one or more axes. Which entries a load touches, and which of them must be
masked, follows from the names, so that one kernel body serves any operands: low rank, tensor trains
and block low rank differ in their names alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

LINE_LENGTH = 100
DOT = 16
"""The least side of a tile that takes part in a dot."""


def power(size: int, least: int = 1) -> int:
    """The smallest power of two that is no less than both."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def quotient(size: int, part: int) -> int:
    return -(-size // part)


@dataclass(frozen=True)
class Axis:
    """An index of a tile: the variable that holds its positions, and where they must be masked.

    ``limit`` is the size that some positions reach over, ``None`` where none does. ``narrow``
    positions have 32 bits, and are widened where the caller says how far apart they are.
    """

    name: str
    variable: str
    limit: int | str | None = None
    narrow: bool = False


Dimension = tuple[Axis, ...]
"""One dimension of a tile; several axes where they were flattened, all as long as the dimension."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes: the stride of each of its axes.

    ``dtype``: ``"element"`` is that of x; workspaces are ``"float32"``, counters ``"int32"``, row
    numbers ``"int64"``. ``width``: the entries of a row, where the caller says how far apart
    rows are.
    """

    name: str
    strides: tuple[tuple[str, int | str], ...]
    dtype: str = "element"
    width: int = 0

    @classmethod
    def of(
        cls, name: str, axes: Sequence[str], sizes: Mapping[str, int], *, dtype: str = "element"
    ) -> Operand:
        """A contiguous tensor."""
        return cls(name, contiguous(axes, sizes), dtype)

    @classmethod
    def rows(cls, name: str, axes: Sequence[str], sizes: Mapping[str, int]) -> Operand:
        """Contiguous rows, of which the caller says how far they are apart."""
        width = math.prod(sizes[axis] for axis in axes)
        return cls(name, (("b", f"{name}_row"), *contiguous(axes, sizes)), width=width)

    def over(self, axis: str) -> Operand:
        """The same along one more axis, of size 1 where the tensor has none: tiles keep their shape
        and nothing but the first position is read or written."""
        return self if axis in self.axes else replace(self, strides=(*self.strides, (axis, 0)))

    @property
    def row_stride(self) -> str | None:
        return f"{self.name}_row" if self.width else None

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.strides)


def contiguous(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(
        (axis, math.prod(sizes[other] for other in axes[place + 1 :]))
        for place, axis in enumerate(axes)
    )


def _spread(variable: str, place: int, dimensions: int) -> str:
    """A vector along one dimension of a tile."""
    if dimensions == 1:
        return variable
    places = ", ".join(":" if k == place else "None" for k in range(dimensions))
    return f"{variable}[{places}]"


def _times(variable: str, stride: int | str) -> str:
    return variable if stride == 1 else f"{variable} * {stride}"


class Lines:
    """Statements, indented; written as ruff would format them."""

    def __init__(self, depth: int = 1) -> None:
        self.lines: list[str] = []
        self.depth = depth

    def __call__(self, text: str = "") -> None:
        line = "    " * self.depth + text if text else ""
        assert len(line) <= LINE_LENGTH, f"too long: {line}"
        self.lines.append(line)

    def note(self, text: str) -> None:
        self(f"# {text}")

    @contextlib.contextmanager
    def block(self, header: str) -> Iterator[None]:
        self(f"{header}:")
        self.depth += 1
        yield
        self.depth -= 1

    def call(self, start: str, arguments: Sequence[str], end: str = "") -> None:
        """``start`` ends where the arguments begin; they go below each other if too long."""
        line = f"{start}({', '.join(arguments)}){end}"
        if 4 * self.depth + len(line) <= LINE_LENGTH:
            self(line)
            return
        self(f"{start}(")
        self.depth += 1
        for argument in arguments:
            whole = f"{argument},"
            if 4 * self.depth + len(whole) <= LINE_LENGTH:
                self(whole)
                continue
            # Every term below the other, as ruff breaks a sum, or a conjunction.
            sign = " & " if argument.startswith("mask=") else " + "
            for place, term in enumerate(terms := argument.split(sign)):
                comma = "," if place == len(terms) - 1 else ""
                self(f"{sign.lstrip() if place else ''}{term}{comma}")
        self.depth -= 1
        self(f"){end}")

    def vector(self, variable: str, start: str, tile: int) -> None:
        self(f"{variable} = {start + ' + ' if start else ''}tl.arange(0, {tile})")

    def zeros(self, name: str, *shape: int) -> None:
        sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        self(f"{name} = tl.zeros(({sizes}), tl.float32)")

    def load(
        self, target: str, operand: Operand, tile: Sequence[Dimension], more: Sequence[str] = ()
    ) -> None:
        """Axes of the operand that no dimension holds are scalars of that very name."""
        pointer, mask = _address(operand, tile)
        arguments = [pointer, *([f"mask={mask}", "other=0.0"] if mask else []), *more]
        self.call(f"{target} = tl.load", arguments)

    def store(self, operand: Operand, tile: Sequence[Dimension], value: str) -> None:
        pointer, mask = _address(operand, tile)
        self.call("tl.store", [pointer, value, *([f"mask={mask}"] if mask else [])])

    def dot(self, target: str, left: str, right: str) -> None:
        """target += left @ right, in float32."""
        self(f"{target} = dot({left}, {right}, {target}, PRECISION, WIDEN)")


def _address(operand: Operand, tile: Sequence[Dimension]) -> tuple[str, str]:
    places = {axis.name: (axis, k) for k, dimension in enumerate(tile) for axis in dimension}
    terms, conditions = [operand.name], []
    for name, stride in operand.strides:
        if name not in places:
            terms.append(_times(name, stride))
            continue
        axis, place = places[name]
        vector = _spread(axis.variable, place, len(tile))
        far = axis.narrow and stride == operand.row_stride
        terms.append(_times(f"{vector}.to(tl.int64)" if far else vector, stride))
        if axis.limit is not None:
            conditions.append(f"{vector} < {axis.limit}")
    if len(conditions) > 1:
        conditions = [f"({condition})" for condition in conditions]
    return " + ".join(terms), " & ".join(conditions)
