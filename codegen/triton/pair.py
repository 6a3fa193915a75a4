"""Two cores that x meets one after the other, what is between them kept on chip.

Low rank, two cores of a tensor train and block low rank are one body: their named indices say what
is summed by dots, what by loops, and what is a program of its own (``triton_work.roles``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tensorize.codegen.triton import guard
from tensorize.codegen.triton.guard import Check, Outputs
from tensorize.codegen.triton.module import Body, Source, assemble, row_block, title
from tensorize.codegen.triton.pivoted import REST, columns, order_of
from tensorize.codegen.triton.roles import Roles, Tiles, check_on_chip, chunks, roles, suffix
from tensorize.codegen.triton.text import DOT, Axis, Lines, Operand, power, quotient
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work

Widths = Sequence[tuple[int, int]]


def forward(work: Work, tiles: Tiles) -> Source:
    """y = epilogue(norm(x) Wᵀ) of every weight, or the gated product of two."""
    check_on_chip(work)
    every = tuple(range(len(work.specs)))
    groups = [every] if work.gated or work.shared else [(k,) for k in every]
    checked = [each for group in groups for each in _checked(work, tiles, group)]
    bodies = [_body(work, tiles, group, checked) for group in groups]
    what = "y = (x c1ᵀ) c0ᵀ" if work.contract == "columns" else "y = (x c0) c1"
    if work.gated:
        what = f"y = {work.epilogue.activation or 'gate'}(x W_0ᵀ) · (x W_1ᵀ)"
    inputs, outputs = operands(work)
    inputs += guard.operands(work, checked)
    name = "gated" if work.gated else "grouped" if len(every) > 1 else "pair"
    about = title(work, f"{what}, what is between the cores stays on chip")
    return assemble(
        name, about, bodies, inputs=inputs, outputs=outputs, tiles=tiles, checked=checked
    )


def lookup(work: Work, tiles: Tiles) -> Source:
    """Rows of a low-rank table: those of its first core, gathered, times the second."""
    check_on_chip(work)
    (spec,) = work.specs
    row, y = Operand("row", (("b", 1),), "int64"), Operand.rows("y", spec.columns, spec.size)
    role = roles(spec, "rows")
    text = Lines()
    outer_tile, outputs = _outer_tile(tiles, spec.size[role.outer]), spec.size[role.outer]
    programs = quotient(outputs, _slice(tiles, outputs))
    width = _of_each(outputs, programs, outer_tile)
    checked = [Outputs(((role.outer, outputs),), programs, (), role.outer, width)]
    check = Check(text, work, (0,), checked, tiles.rows, looked_up=True)
    row_block(text, tiles)
    check.start("part")
    widths = chunks(spec.size[role.link])
    table, second = (Operand.of(f"c{k}", spec.cores[k], spec.size) for k in range(2))
    block = (Axis("b", "b", "rows"),)
    text.load("number", row, (block,))
    text.note("A row that the table lacks gives what no one takes for a result.")
    text(f"inside = (number >= 0) & (number < {spec.size[role.inner]})")
    text("number = tl.where(inside, number, 0)")
    check.look_up("number")
    check.begin(0)
    ranks = _ranks(text, spec, role, widths)
    for k, rank in enumerate(ranks):
        text.load(f"t{k}", table, ((Axis(role.inner, "number"),), rank))
    with _outputs(text, outputs, role.outer, outer_tile, programs) as outer:
        _expand(text, second, ranks, outer, tiles, outer_tile, "y_tile")
        check.see(0, "y_tile", outer)
        text('y_tile = tl.where(inside[:, None], y_tile, float("nan"))')
        text.store(y, (block, outer), "y_tile.to(y.dtype.element_ty)")
    check.count(0)
    body = Body(tuple(text.lines), (row, table, second, y, *check.operands), programs)
    about = title(work, "y = rows of W by number", planned=False)
    inputs = [row, table, second, *guard.operands(work, checked, looked_up=True)]
    return assemble(
        "lookup",
        about,
        [body],
        inputs=inputs,
        outputs=[y],
        tiles=tiles,
        rows_of="row",
        checked=checked,
    )


def operands(work: Work) -> tuple[list[Operand], list[Operand]]:
    """Inputs and outputs in the order of ``launch``."""
    role = roles(work.specs[0], work.contract)
    size = work.specs[0].size
    inputs, outputs = [Operand.rows("x", role.x, size)], []
    if work.norm is not None:
        inputs.append(Operand.of("gain", role.x, size))
        if work.norm.kind == "layer":
            inputs.append(Operand.of("shift", role.x, size))
    for k, spec in enumerate(work.specs):
        inputs += [core(work, k, number) for number in range(1 if work.shared and k else 2)]
        if spec.pivoted and not (work.shared and k):
            inputs.append(order_of(work, k))
        if work.epilogue.bias:
            inputs.append(Operand.of(f"bias{suffix(work, k)}", roles(spec, work.contract).y, size))
    for k, spec in enumerate(work.specs[:1] if work.gated else work.specs):
        end = "" if work.gated else suffix(work, k)
        y = roles(spec, work.contract).y
        if work.epilogue.residual:
            inputs.append(Operand.rows(f"residual{end}", y, spec.size))
        outputs.append(Operand.rows(f"y{end}", y, spec.size))
    if work.saved:
        for k, spec in enumerate(work.specs):
            saved = roles(spec, work.contract).saved
            outputs.append(Operand.rows(f"t{suffix(work, k)}", saved, spec.size))
    return inputs, outputs


def core(work: Work, k: int, number: int) -> Operand:
    if work.shared and number == 1:
        k = 0  # the first factor that all have
    spec = work.specs[k]
    axes, size = spec.cores[number], dict(spec.size)
    if spec.pivoted and number == 1:
        axes, size[REST] = (axes[0], REST), spec.core_shapes[1][-1]
    return Operand.of(f"c{number}{suffix(work, k)}", axes, size)


# ----------------------------------------------------------------------------------- the body


def _checked(work: Work, tiles: Tiles, group: Sequence[int]) -> list[Outputs]:
    """Which outputs the programs of a body have, of every weight of its group."""
    role = roles(work.specs[group[0]], work.contract)
    widest = max(work.specs[k].size[role.outer] for k in group)
    found = []
    for k in group:
        size = work.specs[k].size
        width = _outer_tile(tiles, widest)
        slices = quotient(widest, width if role.loops else _slice(tiles, widest))
        if not role.loops:
            width = _of_each(size[role.outer], slices, width)
        programs = slices * math.prod(size[axis] for axis in role.grid)
        axes = tuple((axis, size[axis]) for axis in role.y)
        found.append(Outputs(axes, programs, role.grid, role.outer, width))
    return found


def _body(work: Work, tiles: Tiles, group: Sequence[int], checked: Sequence[Outputs]) -> Body:
    spec = work.specs[group[0]]
    role = roles(spec, work.contract)
    size = spec.size
    known = {o.name: o for part in operands(work) for o in part}
    heads = group[:1] if work.shared else group
    widest = max(work.specs[k].size[role.outer] for k in group)
    text = Lines()
    row_block(text, tiles)
    check = Check(text, work, group, checked, tiles.rows)
    check.start("part")
    # Which program: a slice of the outputs, and one entry of every index of the grid.
    slices = quotient(widest, _slice(tiles, widest))
    for axis in reversed(role.grid):
        text(f"{axis} = part % {size[axis]}")
        text(f"part = part // {size[axis]}")
    programs = slices * math.prod(size[axis] for axis in role.grid)
    block = (Axis("b", "b", "rows"),)
    ranks = {}
    for k in heads:
        width = chunks(work.specs[k].size[role.link])
        ranks[k] = _ranks(text, work.specs[k], role, width, _mark(heads, k))
    used = [known["x"]]
    outer_tile = _outer_tile(tiles, widest)
    if role.loops:
        text.vector(role.outer, f"part * {outer_tile}", outer_tile)
        outer = (axis_of(role.outer, size[role.outer], outer_tile),)
        programs = programs // slices * quotient(size[role.outer], outer_tile)
        text.zeros("y_tile", tiles.rows, outer_tile)
    with contextlib.ExitStack() as nest:
        for axis in role.loops:
            nest.enter_context(text.block(f"for {axis} in range({size[axis]})"))
        _project(text, work, tiles, heads, role, ranks, check)
        used += [core(work, k, number) for k in group for number in range(2)]
        used += [order_of(work, k) for k in heads if work.specs[k].pivoted]
        for k in heads:
            if work.saved:
                saved = known[f"t{suffix(work, k)}"]
                used.append(saved)
                text.note("For the gradients of the cores.")
                with text.block("if part == 0"):
                    for c, rank in enumerate(ranks[k]):
                        text.store(saved, (block, rank), f"t{_mark(heads, k)}{c}")
        if role.loops:
            second = core(work, group[0], role.second)
            for c, rank in enumerate(ranks[group[0]]):
                text.load(f"w{c}", second, (rank, outer))
                text.dot("y_tile", f"t{c}", f"w{c}")
    for k in group:
        check.begin(k)
    if role.loops:
        check.see(group[0], "y_tile", outer)
        used += _finish(text, work, known, group, block, outer)
    else:
        results = [group] if work.gated else [(k,) for k in group]
        for result in results:
            outputs = work.specs[result[0]].size[role.outer]
            loop = len(results) > 1  # names of one loop are not those of the next
            with _outputs(text, outputs, role.outer, outer_tile, slices, loop) as outer:
                for k in result:
                    second = core(work, k, role.second)
                    head = k if k in heads else heads[0]
                    name, mark = _result(result, k), _mark(heads, head)
                    _expand(text, second, ranks[head], outer, tiles, outer_tile, name, mark)
                    check.see(k, name, outer)
                used += _finish(text, work, known, result, block, outer)
    if work.norm is not None:
        used += [known[name] for name in ("gain", "shift") if name in known]
    for k in group:
        check.count(k)
    used += check.operands
    return Body(tuple(text.lines), tuple(used), programs)


def _mark(group: Sequence[int], k: int) -> str:
    """What tells the intermediates of several weights apart."""
    return f"{'gu'[group.index(k)]}_" if len(group) > 1 else ""


def _result(group: Sequence[int], k: int) -> str:
    return ("y_tile", "up")[group.index(k)]


def axis_of(name: str, size: int, tile: int) -> Axis:
    return Axis(name, name, size if size % tile else None)


def _slice(tiles: Tiles, outputs: int) -> int:
    """Outputs of one program: whole tiles."""
    tile = _outer_tile(tiles, outputs)
    return tile * quotient(min(tiles.slice, outputs), tile)


def _of_each(outputs: int, slices: int, tile: int) -> int:
    """Outputs of each of so many slices: whole tiles."""
    return tile * quotient(quotient(outputs, slices), tile)


def _outer_tile(tiles: Tiles, outputs: int) -> int:
    return min(tiles.outer, power(outputs, DOT))


def _ranks(
    text: Lines, spec: TTSpec, role: Roles, widths: Widths, mark: str = ""
) -> list[tuple[Axis, ...]]:
    """The positions of every part of the rank, one dimension each."""
    size, found = spec.size[role.link], []
    for c, (start, width) in enumerate(widths):
        name = f"r_{mark}{c}"
        text.vector(name, str(start) if start else "", width)
        found.append((Axis(role.link, name, size if start + width > size else None),))
    return found


def _project(
    text: Lines,
    work: Work,
    tiles: Tiles,
    group: Sequence[int],
    role: Roles,
    ranks: dict[int, list[tuple[Axis, ...]]],
    check: Check,
) -> None:
    """t = norm(x) times the first core of every weight of the group, rounded to x's dtype."""
    size = work.specs[group[0]].size
    names = [(k, c, f"t{_mark(group, k)}{c}") for k in group for c in range(len(ranks[k]))]
    width = {name: chunks(work.specs[k].size[role.link])[c][1] for k, c, name in names}
    pivoted = work.specs[group[0]].pivoted > 0
    for _, _, name in names:
        text.zeros(name, tiles.rows, width[name])
    block = (Axis("b", "b", "rows"),)
    x = Operand.rows("x", role.x, size)
    inner_tile = min(tiles.inner, power(size[role.inner], DOT))
    inner = (axis_of(role.inner, size[role.inner], inner_tile),)

    def over_row() -> contextlib.AbstractContextManager[None]:
        length = size[role.inner]
        return inner_loop(text, role.inner, "0", str(length), inner_tile, length)

    if work.norm is not None and work.norm.kind == "layer":
        _row_statistics(text, work.norm, x, over_row, block, inner, tiles.rows)
    rides_along = start_norm(text, work, tiles.rows)

    def meet(met: tuple[Axis, ...]) -> None:
        text.load("x_tile", x, (block, met))
        apply_norm(text, work, role, met)
        check.meet(met)

    loop, held = over_row, inner
    if pivoted:
        n, rest = work.into, work.specs[group[0]].core_shapes[1][-1]
        tile = min(tiles.inner, power(rest, DOT))
        held = (axis_of(REST, rest, tile),)
        inner = (Axis(role.inner, role.inner, n if rest % tile else None),)
        loop = partial(inner_loop, text, REST, "0", str(rest), tile, rest)
    with loop():
        if pivoted:
            within = f"{REST} < {rest}" if rest % tile else ""
            columns(text, work, group[0], role.inner, f"{n - rest} + {REST}", within)
        meet(inner)
        for k, c, name in names:
            text.load("first", core(work, k, role.first), (held, ranks[k][c]))
            text.dot(name, "x_tile", "first")
    if pivoted:
        text.note("Where the first factor is the identity.")
        for (rank,), (k, _, name) in zip(ranks[group[0]], names, strict=True):
            within = f"{rank.variable} < {rank.limit}" if rank.limit is not None else ""
            columns(text, work, k, "kept", rank.variable, within)
            meet((Axis(role.inner, "kept", n if within else None),))
            text(f"{name} += x_tile.to(tl.float32)")
    if rides_along:
        text(f"scale = {scale_of(work)}")
        check.scale("scale")
    for _, _, name in names:
        if rides_along:
            text(f"{name} *= scale[:, None]")
        text(f"{name} = {name}.to(x.dtype.element_ty)")


@contextlib.contextmanager
def inner_loop(
    text: Lines, axis: str, start: str, stop: str, tile: int, size: int, always: bool = False
) -> Iterator[None]:
    """Over the entries of an axis; no loop where one tile holds all, unless ``always``."""
    if size <= tile and start == "0" and not always:
        text.vector(axis, "", tile)
        yield
        return
    header = f"for start in range({start}, {stop}, {tile})"
    with text.block(header):
        text.vector(axis, "start", tile)
        yield


# -------------------------------------------------------------------------------------- norms


_SPARE = 16
"""A gain is made smaller by this, a power of two, so that in float16 no product of it and an entry
is too large; it comes back with the scale."""


def _row_statistics(
    text: Lines,
    norm: Norm,
    x: Operand,
    over_row: Callable[[], contextlib.AbstractContextManager[None]],
    block: tuple[Axis, ...],
    inner: tuple[Axis, ...],
    rows: int,
) -> None:
    """Of a layer norm, in a pass of their own: an entry is rounded after the mean is taken off.

    Taken off the result instead, it would leave the rounding of entries that are far from zero.
    """
    limit = inner[0].limit
    text.note("Relative to a row's first entry, so that no large mean is taken from itself.")
    text("pilot = tl.load(x + b * x_row, mask=b < rows, other=0.0).to(tl.float32)")
    text.zeros("sums", rows)
    text.zeros("squares", rows)
    with over_row():
        text.load("x_tile", x, (block, inner))
        shifted = "x_tile.to(tl.float32) - pilot[:, None]"
        if limit is not None:
            shifted = f"tl.where({inner[0].variable}[None, :] < {limit}, {shifted}, 0.0)"
        text(f"wide = {shifted}")
        text("sums += tl.sum(wide, 1)")
        text("squares += tl.sum(wide * wide, 1)")
    text(f"mean = sums / {x.width}")
    text(f"variance = tl.maximum(squares / {x.width} - mean * mean, 0.0)")
    text(f"scale = tl.rsqrt(variance + {norm.eps})")


def start_norm(text: Lines, work: Work, rows: int) -> bool:
    """Whether the norm's statistic rides along while x is read: it then scales the result."""
    if work.norm is None or work.norm.kind != "rms":
        return False
    text.zeros("squares", rows)
    return True


def apply_norm(text: Lines, work: Work, role: Roles, inner: tuple[Axis, ...]) -> None:
    """What a tile of x becomes before it meets a core, and what the statistic learns of it."""
    if work.norm is None:
        return
    size = work.specs[0].size
    text("wide = x_tile.to(tl.float32)")
    text.load("gain_tile", Operand.of("gain", role.x, size), (inner,))
    text("gain_tile = gain_tile.to(tl.float32)")
    if work.norm.kind == "layer":
        text.load("shift_tile", Operand.of("shift", role.x, size), (inner,))
        text("shift_tile = shift_tile.to(tl.float32)")
        text("wide = (wide - pilot[:, None] - mean[:, None]) * scale[:, None]")
        text("wide = wide * gain_tile[None, :] + shift_tile[None, :]")
        text("x_tile = wide.to(x.dtype.element_ty)")
        return
    text("squares += tl.sum(wide * wide, 1)")
    text(f"gain_tile *= {1 / _SPARE}")
    text("x_tile = (wide * gain_tile[None, :]).to(x.dtype.element_ty)")


def scale_of(work: Work) -> str:
    """What the result of an RMS norm that rides along is to be multiplied by."""
    assert work.norm is not None
    return f"{_SPARE} * tl.rsqrt(squares / {work.into} + {work.norm.eps})"


# ------------------------------------------------------------------------------------- outputs


@contextlib.contextmanager
def _outputs(
    text: Lines, outputs: int, axis: str, tile: int, slices: int, loop: bool = False
) -> Iterator[tuple[Axis, ...]]:
    """Over the outputs of this program, tile by tile: those of one of the slices."""
    if slices == 1:
        first, last = "0", str(outputs)
    else:
        part = _of_each(outputs, slices, tile)
        text(f"low = part * {part}")
        first = "low"
        whole = outputs == part * slices
        last = f"low + {part}" if whole else f"min(low + {part}, {outputs})"
    with inner_loop(text, axis, first, last, tile, outputs, loop):
        yield (axis_of(axis, outputs, tile),)


def _expand(
    text: Lines,
    operand: Operand,
    ranks: Sequence[tuple[Axis, ...]],
    outer: tuple[Axis, ...],
    tiles: Tiles,
    tile: int,
    result: str,
    mark: str = "",
) -> None:
    """result = t times a tile of the second core."""
    text.zeros(result, tiles.rows, tile)
    for c, rank in enumerate(ranks):
        text.load("second", operand, (rank, outer))
        text.dot(result, f"t{mark}{c}", "second")


def _finish(
    text: Lines,
    work: Work,
    known: dict[str, Operand],
    group: Sequence[int],
    block: tuple[Axis, ...],
    outer: tuple[Axis, ...],
) -> list[Operand]:
    """The epilogue on ``y_tile`` (and ``up``), and the store; what it reads and writes."""
    end = "" if work.gated else suffix(work, group[0])
    used = epilogue(text, work, known, group, end, block, outer)
    y = known[f"y{end}"]
    text.store(y, (block, outer), f"y_tile.to({y.name}.dtype.element_ty)")
    return [*used, y]


def epilogue(
    text: Lines,
    work: Work,
    known: dict[str, Operand],
    group: Sequence[int],
    end: str,
    block: tuple[Axis, ...],
    outer: tuple[Axis, ...],
) -> list[Operand]:
    """Bias, activation, product, scale and residual, on float32 tiles."""
    what: Epilogue = work.epilogue
    used = []
    if what.bias:
        for k in group:
            bias = known[f"bias{suffix(work, k)}"]
            text.load("bias_tile", bias, (block, outer))
            text(f"{_result(group, k)} += bias_tile.to(tl.float32)")
            used.append(bias)
    if what.activation is not None:
        for line in _ACTIVATIONS[what.activation]:
            text(line)
    if len(group) > 1:
        text("y_tile *= up")
    if what.scale is not None:
        text(f"y_tile *= {what.scale}")
    if what.residual:
        residual = known[f"residual{end}"]
        text.load("residual_tile", residual, (block, outer))
        text("y_tile += residual_tile.to(tl.float32)")
        used.append(residual)
    return used


_ACTIVATIONS = {
    # Not ``tl.maximum``, which makes a number of NaN on a GPU.
    "relu": ("y_tile = tl.where(y_tile < 0.0, 0.0, y_tile)",),
    "silu": ("y_tile *= tl.sigmoid(y_tile)",),
    "gelu": ("y_tile *= 0.5 + 0.5 * tl.erf(y_tile * 0.7071067811865476)",),
    # tanh(u) = 2 sigmoid(2 u) - 1
    "gelu_tanh": (
        "cubic = y_tile + 0.044715 * y_tile * y_tile * y_tile",
        "y_tile *= tl.sigmoid(1.5957691216057308 * cubic)",
    ),
}
