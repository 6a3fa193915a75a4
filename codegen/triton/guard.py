"""Lines of a kernel that checks its own product: y · signs = x · (Wᵀ signs), row by row.

A program checks what it computes, before the epilogue and before anything is rounded: the outputs
that are its own, against x as it meets the first core and sums of the weight over those outputs. So
no program waits for another one. Wrong rows are added to the one counter of a launch, which has an
entry for each weight. It costs what one more column of the first core would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tensorize.codegen.triton.roles import sides, suffix
from tensorize.codegen.triton.text import Axis, Dimension, Lines, Operand, contiguous
from tensorize.ir.work import Work

LIMITS = Operand("limits", (), "float32")
"""Two for each weight: what a row of length 1 may be off by, and what any row may."""
WRONG = Operand("wrong", (), "int32")
"""The counter: zeros, to which the wrong rows of every weight are added."""

SQUARES = Operand("squares", (("number", 1),), "float32")
"""Squared lengths of the rows of a table."""

_PROGRAM, _NUMBER = "check", "number"


@dataclass(frozen=True)
class Outputs:
    """Which outputs of one weight each of the ``programs`` of a row block has.

    ``axes``: those of y with their sizes. The number of a program counts slices of ``width``
    entries of the axis ``outer``, and below them the entries of the axes of ``grid``.
    """

    axes: tuple[tuple[str, int], ...]
    programs: int = 1
    grid: tuple[str, ...] = ()
    outer: str = ""
    width: int = 1

    def owners(self) -> list[int]:
        """For every output, the number of the program that has it."""
        size = dict(self.axes)
        stride = dict(contiguous(tuple(size), size))

        def owner(output: int) -> int:
            at = {axis: output // stride[axis] % size[axis] for axis in size}
            number = at[self.outer] // self.width if self.outer else 0
            for axis in self.grid:
                number = number * size[axis] + at[axis]
            return number

        return [owner(output) for output in range(math.prod(size.values()))]


def operands(work: Work, outputs: Sequence[Outputs], *, looked_up: bool = False) -> list[Operand]:
    """What a launch is given for its check; none where it has none. ``looked_up``: x are numbers of
    rows."""
    if not work.guarded:
        return []
    found = []
    for k in range(len(work.specs)):
        found += [signs(work, k), sums(work, k, outputs[k], looked_up=looked_up)]
    return [*found, *([SQUARES] if looked_up else []), LIMITS, WRONG]


def signs(work: Work, k: int) -> Operand:
    spec = work.specs[k]
    y = sides(spec, work.contract)[1]
    return Operand.of(f"signs{suffix(work, k)}", y, spec.size, dtype="float32")


def sums(work: Work, k: int, outputs: Outputs, *, looked_up: bool) -> Operand:
    """Of the weight over the outputs of every program."""
    spec = work.specs[k]
    axes, size = sides(spec, work.contract)[0], dict(spec.size)
    if looked_up:
        axes, size = (_NUMBER,), {_NUMBER: math.prod(size[axis] for axis in axes)}
    if outputs.programs > 1:
        axes, size[_PROGRAM] = (_PROGRAM, *axes), outputs.programs
    return Operand.of(f"checksums{suffix(work, k)}", axes, size, dtype="float32")


class Check:
    """The check of the weights of one body, written where the body computes; nothing where the work
    is not guarded."""

    def __init__(
        self, text: Lines, work: Work, group: Sequence[int], outputs: Sequence[Outputs],
        rows: int, *, looked_up: bool = False,
    ) -> None:  # fmt: skip
        self.text, self.work, self.rows, self.looked_up = text, work, rows, looked_up
        self.group = tuple(group) if work.guarded else ()
        self.outputs = {k: outputs[k] for k in self.group}

    @property
    def operands(self) -> list[Operand]:
        """What the body reads and writes for it."""
        found = [each for k in self.group for each in (signs(self.work, k), self._sums(k))]
        found += [SQUARES] if self.looked_up else []
        return [*found, LIMITS, WRONG] if self.group else []

    @property
    def sums_of_x(self) -> list[str]:
        """The variables that x adds to, a number for each row."""
        return [*(self._of("x", k) for k in self.group), "x_size"] if self.group else []

    def start(self, program: str) -> None:
        """``program``: what holds the number of the program, as ``Outputs`` counts."""
        if any(self.outputs[k].programs > 1 for k in self.group):
            self.text(f"{_PROGRAM} = {program}")
        for name in () if self.looked_up else self.sums_of_x:
            self.text.zeros(name, self.rows)

    def meet(self, inner: Dimension) -> None:
        """x in ``x_tile``, as it meets the first core."""
        if not self.group:
            return
        self.text("met = x_tile.to(tl.float32)")
        for k in self.group:
            self.text.load("sums_tile", self._sums(k), (inner,))
            self.text(f"{self._of('x', k)} += tl.sum(met * sums_tile[None, :], 1)")
        self.text("x_size += tl.sum(met * met, 1)")

    def look_up(self, number: str) -> None:
        """The rows of a table by number: their sums and their squared lengths are known."""
        for k in self.group:
            tile = ((Axis(_NUMBER, number),),)
            self.text.load(self._of("x", k), self._sums(k), tile)
            self.text.load("x_size", SQUARES, tile)

    def scale(self, scale: str) -> None:
        """What comes out was multiplied by something, row by row."""
        for k in self.group:
            self.text(f"{self._of('x', k)} *= {scale}")
        if self.group:
            self.text(f"x_size *= {scale} * {scale}")

    def begin(self, k: int) -> None:
        """Before the outputs of a weight."""
        if k in self.group:
            self.text.zeros(self._of("y", k), self.rows)

    def see(self, k: int, tile: str, outer: Dimension) -> None:
        """Some outputs in ``tile``: (rows, outputs), 0 where there are none."""
        if k in self.group:
            self.text.load("signs_tile", signs(self.work, k), (outer,))
            self.text(f"{self._of('y', k)} += tl.sum({tile} * signs_tile[None, :], 1)")

    def see_all(self, k: int, tile: str, outputs: tuple[Dimension, Dimension], of_row: int) -> None:
        """All outputs of a program in ``tile``, in which a row of x has ``of_row`` rows."""
        if k not in self.group:
            return
        held, y = signs(self.work, k), self._of("y", k)
        for axis in (*outputs[0], *outputs[1]):
            held = held if axis.name == "b" else held.over(axis.name)
        self.text.load("signs_tile", held, outputs)
        self.text(f"{y} = tl.sum({tile} * signs_tile, 1)")
        if of_row > 1:
            self.text(f"{y} = tl.sum(tl.reshape({y}, ({self.rows}, {of_row})), 1)")

    def count(self, k: int) -> None:
        """Compare, and add the wrong rows to the counter."""
        if k not in self.group:
            return
        text, off = self.text, f"tl.abs({self._of('y', k)} - {self._of('x', k)})"
        text(f"limit = tl.load(limits + {2 * k}) * tl.sqrt(x_size)")
        text(f"limit = tl.maximum(limit, tl.load(limits + {2 * k + 1}))")
        text.note("Nothing is known of a row whose x is not finite.")
        text(f'wrong_rows = (x_size < float("inf")) & ~({off} <= limit)')
        if self.rows > 1:
            text("wrong_rows = wrong_rows & (b < rows)")
        # No sum first: compiled for Blackwell, one over what dots gave would be a triton error.
        every = "b" if self.rows > 1 else "asked"
        text(f"tl.atomic_add(wrong + {k} + {every} * 0, 1, mask=wrong_rows)")

    def _sums(self, k: int) -> Operand:
        return sums(self.work, k, self.outputs[k], looked_up=self.looked_up)

    def _of(self, side: str, k: int) -> str:
        return f"{side}_check{suffix(self.work, k) if len(self.group) > 1 else ''}"
