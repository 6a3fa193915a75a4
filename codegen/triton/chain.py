"""Chains of small cores: three or four of a tensor train, nothing permuted between them.

x meets the last core first. What a core leaves is a tile of (rows and outputs so far) by (its
output, its rank); that is the next core's operand after a reshape that moves nothing, because the
order of the columns is chosen when the core is loaded. The index of x that a core sums is a loop
around all that comes before it. So every program does the FLOPs of the cheapest order.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

from tensorize.codegen.triton import guard
from tensorize.codegen.triton.guard import Check, Outputs
from tensorize.codegen.triton.module import Body, Source, assemble, row_block, title
from tensorize.codegen.triton.pair import epilogue, inner_loop
from tensorize.codegen.triton.roles import NotCovered, Tiles, sides
from tensorize.codegen.triton.text import DOT, Axis, Dimension, Lines, Operand, power
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work

MOST_ELEMENTS = 16384
"""Of an accumulator: as many float32 as fill half the registers of four warps."""


NONE = "none"
"""The axis of outputs of a first core that has none."""


@dataclass(frozen=True)
class _Core:
    """One core: the index of x that it sums, its output, the rank it leaves; ``None``: absent."""

    operand: Operand
    summed: str | None
    out: str | None
    rank_out: str | None


def _cores(spec: TTSpec, contract: str) -> list[_Core]:
    x, y = sides(spec, contract)
    ranks = {f"r{k}" for k in range(1, len(spec.cores))}
    found = []
    for k, axes in enumerate(spec.cores):
        if not set(axes) <= {*x, *y, f"r{k}", f"r{k + 1}"} or not ranks:
            raise NotCovered(f"{spec} is no chain")
        found.append(
            _Core(
                Operand.of(f"c{k}", axes, spec.size),
                next((axis for axis in axes if axis in x), None),
                next((axis for axis in axes if axis in y), None),
                f"r{k}" if f"r{k}" in axes else None,
            )
        )
    return found


class _Widths:
    """Padded sizes: of outputs to powers of two, of what a dot sums or leaves to 16 at least."""

    def __init__(self, spec: TTSpec, contract: str) -> None:
        self.size = spec.size
        self.cores = _cores(spec, contract)

    def out(self, k: int) -> int:
        name = self.cores[k].out
        return power(self.size[name], DOT if k == 0 else 1) if name else (DOT if k == 0 else 1)

    def rank(self, k: int) -> int:
        """Of core k towards core k - 1."""
        name = self.cores[k].rank_out
        return power(self.size[name], DOT) if name else 1

    def limit(self, axis: str | None, width: int) -> int | None:
        """What masks the positions of an axis; one that is absent is in no address to mask."""
        return None if axis is None or self.size[axis] == width else self.size[axis]


def check_on_chip(spec: TTSpec, contract: str) -> None:
    """Raises NotCovered where the accumulators of 16 rows do not fit into registers."""
    widths = _Widths(spec, contract)
    last = len(spec.cores) - 1
    rows = DOT
    for k in range(last - 1, -1, -1):
        held = rows * widths.out(k) * widths.rank(k)
        if held > MOST_ELEMENTS:
            raise NotCovered(f"{spec}: {held} accumulators for 16 rows do not fit on chip")
        rows *= widths.out(k)


def block_rows(spec: TTSpec, contract: str, most: int) -> int:
    """The rows of a program: as many as fit on chip, up to ``most``."""
    widths = _Widths(spec, contract)
    rows, worst = 1, 1
    for k in range(len(spec.cores) - 2, -1, -1):
        worst = max(worst, rows * widths.out(k) * widths.rank(k))
        rows *= widths.out(k)
    fitting = MOST_ELEMENTS // worst
    return max(DOT, min(most, 1 << max(fitting.bit_length() - 1, 0)))


def forward(work: Work, tiles: Tiles) -> Source:
    """y = epilogue(x Wᵀ) of one chain; one output index of the last core is a program's own."""
    (spec,) = work.specs
    check_on_chip(spec, work.contract)
    widths = _Widths(spec, work.contract)
    cores, last = widths.cores, len(spec.cores) - 1
    if cores[last].summed is None:
        raise NotCovered(f"{spec}: the last core sums no index of x")
    x_axes, y_axes = sides(spec, work.contract)
    known = {o.name: o for o in _operands(work, x_axes, y_axes)}
    text = Lines()
    row_block(text, tiles)
    out = cores[last].out
    if out:
        text(f"{out} = part")
    programs = spec.size[out] if out else 1
    grid = (out,) if out else ()
    checked = [Outputs(tuple((axis, spec.size[axis]) for axis in y_axes), programs, grid)]
    check = Check(text, work, (0,), checked, tiles.rows)
    check.start("part")
    for k in range(last, 0, -1):
        text.vector(f"r{k}", "", widths.rank(k))
    columns = [_columns(text, widths, k) for k in range(last)]
    _level(text, widths, tiles, known["x"], columns, 0, check)
    block = _output_rows(text, widths, tiles)
    text("y_tile = t0")
    check.see_all(0, "y_tile", (block, columns[0]), _rows_of(widths, tiles, 0) // tiles.rows)
    check.count(0)
    epilogue(text, work, known, (0,), "", block, columns[0])
    y = known["y"] if cores[0].out else known["y"].over(NONE)
    text.store(y, (block, columns[0]), "y_tile.to(y.dtype.element_ty)")
    inputs = [operand for name, operand in known.items() if name != "y"]
    inputs += guard.operands(work, checked)
    body = Body(tuple(text.lines), (*known.values(), *check.operands), programs)
    about = title(work, "y = x through the cores from the last to the first, all on chip")
    return assemble(
        "chain",
        about,
        [body],
        inputs=inputs,
        outputs=[known["y"]],
        tiles=tiles,
        checked=checked,
    )


def _operands(work: Work, x_axes: tuple[str, ...], y_axes: tuple[str, ...]) -> list[Operand]:
    (spec,) = work.specs
    found = [Operand.rows("x", x_axes, spec.size)]
    found += [Operand.of(f"c{k}", axes, spec.size) for k, axes in enumerate(spec.cores)]
    if work.epilogue.bias:
        found.append(Operand.of("bias", y_axes, spec.size))
    if work.epilogue.residual:
        found.append(Operand.rows("residual", y_axes, spec.size))
    return [*found, Operand.rows("y", y_axes, spec.size)]


def _columns(text: Lines, widths: _Widths, k: int) -> Dimension:
    """The columns of what core k leaves: its output and, below that, its rank."""
    core, out, rank = widths.cores[k], widths.out(k), widths.rank(k)
    if k == 0:
        text.vector("m", "", out)
        return (Axis(core.out or NONE, "m", widths.limit(core.out, out) if core.out else 1),)
    text.vector(f"j{k}", "", out * rank)
    text(f"r{k}_of_j{k} = j{k} % {rank}")
    found = [Axis(f"r{k}", f"r{k}_of_j{k}", widths.limit(f"r{k}", rank))]
    if core.out:
        text(f"{core.out}_of_j{k} = j{k} // {rank}")
        found.append(Axis(core.out, f"{core.out}_of_j{k}", widths.limit(core.out, out)))
    return tuple(found)


def _rows_of(widths: _Widths, tiles: Tiles, k: int) -> int:
    """Rows of the tile that core k leaves: those of x, times the outputs of the cores before."""
    last = len(widths.cores) - 1
    return tiles.rows * math.prod(widths.out(j) for j in range(k + 1, last))


def _level(
    text: Lines,
    widths: _Widths,
    tiles: Tiles,
    x: Operand,
    columns: list[Dimension],
    k: int,
    check: Check,
) -> None:
    """t_k = what x through the cores from the last to k leaves."""
    core, last = widths.cores[k], len(widths.cores) - 1
    rows = _rows_of(widths, tiles, k)
    text.zeros(f"t{k}", rows, widths.out(k) * widths.rank(k))
    loop: contextlib.AbstractContextManager = contextlib.nullcontext()
    if core.summed is not None:
        loop = text.block(f"for {core.summed} in range({widths.size[core.summed]})")
    with loop:
        if k + 1 == last:
            _first(text, widths, tiles, x, check)
        else:
            _level(text, widths, tiles, x, columns, k + 1, check)
        rank = (Axis(f"r{k + 1}", f"r{k + 1}", widths.limit(f"r{k + 1}", widths.rank(k + 1))),)
        operand = core.operand if k or core.out else core.operand.over(NONE)
        text.load("w", operand, (rank, columns[k]))
        before = f"t{k + 1}.to(x.dtype.element_ty)"
        if k + 1 < last and widths.out(k + 1) > 1:
            before = f"tl.reshape({before}, ({rows}, {widths.rank(k + 1)}))"
        text(f"rows_of_t{k} = {before}")
        text.dot(f"t{k}", f"rows_of_t{k}", "w")


def _first(text: Lines, widths: _Widths, tiles: Tiles, x: Operand, check: Check) -> None:
    """x meets the last core."""
    last = len(widths.cores) - 1
    core = widths.cores[last]
    axis = core.summed
    assert axis is not None
    text.zeros(f"t{last}", tiles.rows, widths.rank(last))
    tile = min(tiles.inner, power(widths.size[axis], DOT))
    with inner_loop(text, axis, "0", str(widths.size[axis]), tile, widths.size[axis]):
        inner = (Axis(axis, axis, widths.size[axis] if widths.size[axis] % tile else None),)
        text.load("x_tile", x, ((Axis("b", "b", "rows"),), inner))
        check.meet(inner)
        rank = (Axis(f"r{last}", f"r{last}", widths.limit(f"r{last}", widths.rank(last))),)
        text.load("w", core.operand, (inner, rank))
        text.dot(f"t{last}", "x_tile", "w")


def _output_rows(text: Lines, widths: _Widths, tiles: Tiles) -> Dimension:
    """The rows of the last tile: those of x and, below them, the outputs of the middle cores."""
    last = len(widths.cores) - 1
    middle = [k for k in range(last - 1, 0, -1) if widths.out(k) > 1]
    if not middle:
        return (Axis("b", "b", "rows"),)
    inside = math.prod(widths.out(k) for k in middle)
    text.vector("i", "", tiles.rows * inside)
    text(f"b_of_i = tl.program_id(0).to(tl.int64) * {tiles.rows} + i // {inside}")
    found = [Axis("b", "b_of_i", "rows")]
    for k in middle:
        inside //= widths.out(k)
        name = widths.cores[k].out
        assert name is not None
        digit = f"i // {inside} % {widths.out(k)}" if inside > 1 else f"i % {widths.out(k)}"
        text(f"{name}_of_i = {digit}")
        found.append(Axis(name, f"{name}_of_i", widths.limit(name, widths.out(k))))
    return tuple(found)


# ------------------------------------------------------------------------------------ lookup


def lookup(work: Work, tiles: Tiles) -> Source:
    """Rows of a tensor train by number: a row's digits pick a slice of every core."""
    (spec,) = work.specs
    axes = [axis for core in spec.cores for axis in core if axis in (*spec.rows, *spec.columns)]
    if len(axes) > len(set(axes)):
        raise NotCovered(f"{spec}: cores that share an index of the weight")
    out, rank = _lookup_widths(spec)
    last = len(spec.cores) - 1
    row, y = Operand("row", (("b", 1),), "int64"), Operand.rows("y", spec.columns, spec.size)
    text = Lines()
    text("b = tl.program_id(0).to(tl.int64)")
    text("number = tl.load(row + b)")
    text.note("A row that the table lacks gives what no one takes for a result.")
    text(f"inside = (number >= 0) & (number < {math.prod(spec.row_modes)})")
    text("left = tl.where(inside, number, 0)")
    checked = [Outputs(tuple((axis, spec.size[axis]) for axis in spec.columns))]
    check = Check(text, work, (0,), checked, 1, looked_up=True)
    if work.guarded:
        text("asked = left + tl.arange(0, 1)")
        check.look_up("asked")
    for k in range(len(spec.cores) - 1, -1, -1):
        mode = spec.row_modes[k]
        if mode > 1:
            text(f"m{k} = left % {mode}")
            text(f"left = left // {mode}")
        elif f"m{k}" in spec.cores[k]:
            text(f"m{k} = 0")
    operands = [Operand.of(f"c{k}", axes, spec.size) for k, axes in enumerate(spec.cores)]
    for k in range(1, last + 1):
        text.vector(f"r{k}", "", rank[k])
    ranks: list[Dimension] = [
        (Axis(f"r{k}", f"r{k}", _limit(spec, f"r{k}", rank[k])),) for k in range(last + 1)
    ]
    text.vector("n", "", out[0])
    columns: Dimension = (Axis("n0", "n", _limit(spec, "n0", out[0])),)
    text.load("y_tile", operands[0].over("n0"), (columns, ranks[1]))
    rows = out[0]
    for k in range(1, last + 1):
        width = out[k] * (rank[k + 1] if k < last else 1)
        text.vector(f"j{k}", "", width)
        columns = (Axis(f"n{k}", f"j{k}", _limit(spec, f"n{k}", out[k])),)
        if k < last:
            text(f"r{k + 1}_of_j{k} = j{k} % {rank[k + 1]}")
            text(f"n{k}_of_j{k} = j{k} // {rank[k + 1]}")
            limit = _limit(spec, f"r{k + 1}", rank[k + 1])
            columns = (
                Axis(f"n{k}", f"n{k}_of_j{k}", _limit(spec, f"n{k}", out[k])),
                Axis(f"r{k + 1}", f"r{k + 1}_of_j{k}", limit),
            )
        text.load("w", operands[k].over(f"n{k}"), (ranks[k], columns))
        text.zeros("product", rows, width)
        text.dot("product", "y_tile", "w")
        rows *= out[k]
        text("y_tile = product" + (".to(y.dtype.element_ty)" if k < last else ""))
        if k < last and out[k] > 1:
            text(f"y_tile = tl.reshape(y_tile, ({rows}, {rank[k + 1]}))")
    rows //= out[last]
    text.vector("i", "", rows)
    inside, block = rows, []
    for k in range(last):
        inside //= out[k]
        if f"n{k}" in spec.columns or k == 0:
            digit = f"i // {inside} % {out[k]}" if inside > 1 else f"i % {out[k]}"
            text(f"n{k}_of_i = {digit}")
            block.append(Axis(f"n{k}", f"n{k}_of_i", _limit(spec, f"n{k}", out[k])))
    check.see_all(0, "y_tile", (tuple(block), columns), rows)
    check.count(0)
    text('y_tile = tl.where(inside, y_tile, float("nan"))')
    place = y.over("n0").over(f"n{last}")
    text.store(place, (tuple(block), columns), "y_tile.to(y.dtype.element_ty)")
    body = Body(tuple(text.lines), (row, *operands, y, *check.operands), 1)
    about = title(work, "y = rows of W by number, from one slice of every core", planned=False)
    return assemble(
        "lookup",
        about,
        [body],
        inputs=[row, *operands, *guard.operands(work, checked, looked_up=True)],
        outputs=[y],
        tiles=replace(tiles, rows=1),
        rows_of="row",
        checked=checked,
    )


def _lookup_widths(spec: TTSpec) -> tuple[list[int], list[int]]:
    """Padded sizes of every core's columns, and of its rank towards the core before."""
    last = len(spec.cores) - 1
    out = [power(spec.size.get(f"n{k}", 1), DOT if k in (0, last) else 1) for k in range(last + 1)]
    rank = [1, *(power(spec.ranks[k], DOT) for k in range(last))]
    held = [math.prod(out[:k]) * out[k] * (rank[k + 1] if k < last else 1) for k in range(last + 1)]
    if max(held) > MOST_ELEMENTS:
        raise NotCovered(f"{spec}: {max(held)} entries of a row do not fit on chip")
    return out, rank


def _limit(spec: TTSpec, axis: str, width: int) -> int | None:
    size = spec.size.get(axis, 1)
    return size if size != width else None
