"""Triton source for the gradients of a pair of factors."""

from __future__ import annotations

import contextlib

from tensorize.codegen.triton.module import Body, Source, assemble, title
from tensorize.codegen.triton.pair import axis_of
from tensorize.codegen.triton.roles import NotCovered, Tiles, roles
from tensorize.codegen.triton.text import DOT, Axis, Lines, Operand, power, quotient
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work


def gradients(spec: TTSpec, contract: str, tiles: Tiles, notes: tuple[str, ...]) -> Source:
    """The gradients of both cores of y = x Wᵀ (or x W) in one launch.

    ``t`` is what the pass over x saved and ``s`` what the pass over the gradient dy saved, so no
    product is computed twice.
    """
    size = spec.size
    ahead = roles(spec, contract)
    back = roles(spec, "rows" if contract == "columns" else "columns")
    if ahead.first != back.second:
        raise NotCovered(f"{spec}: x and the gradient of y meet the same core first")
    x, dy = Operand.rows("x", ahead.x, size), Operand.rows("dy", back.x, size)
    t, s = Operand.rows("t", ahead.saved, size), Operand.rows("s", back.saved, size)
    outputs = [Operand.of(f"d{k}", spec.cores[k], size) for k in range(2)]
    second = _outer(spec, tiles, dy, t, outputs[ahead.second], (ahead.outer, ahead.link))
    first = _outer(spec, tiles, s, x, outputs[ahead.first], (ahead.link, ahead.inner))
    about = title(
        Work((spec,), contract, notes=notes),
        "d0, d1 = the gradients of the cores c0, c1",
        planned=False,
    )
    return assemble(
        "gradients",
        about,
        [second, first],
        inputs=(x, dy, t, s),
        outputs=outputs,
        tiles=tiles,
        blocks=False,
    )


def _outer(
    spec: TTSpec,
    tiles: Tiles,
    left: Operand,
    right: Operand,
    result: Operand,
    tile_axes: tuple[str, str],
) -> Body:
    """result = Σ left ⊗ right over the rows and all else that both have and the result has not."""
    size = spec.size
    i, j = tile_axes
    batch = [a for a in result.axes if a not in (i, j)]
    loops = [a for a in left.axes if a in right.axes and a not in result.axes and a != "b"]
    tile = {a: min(tiles.outer, power(size[a], DOT)) for a in (i, j)}
    text = Lines()
    programs = 1
    for axis in batch:
        text(f"{axis} = part % {size[axis]}")
        text(f"part = part // {size[axis]}")
        programs *= size[axis]
    count = quotient(size[j], tile[j])
    text.vector(i, f"part // {count} * {tile[i]}" if count > 1 else f"part * {tile[i]}", tile[i])
    text.vector(j, f"part % {count} * {tile[j]}" if count > 1 else "", tile[j])
    programs *= count * quotient(size[i], tile[i])
    rows, columns = (axis_of(i, size[i], tile[i]),), (axis_of(j, size[j], tile[j]),)
    text.zeros("total", tile[i], tile[j])
    block = (Axis("b", "b", "rows"),)
    with contextlib.ExitStack() as nest:
        for axis in loops:
            nest.enter_context(text.block(f"for {axis} in range({size[axis]})"))
        nest.enter_context(text.block(f"for start in range(0, rows, {tiles.rows})"))
        text(f"b = tl.cast(start, tl.int64) + tl.arange(0, {tiles.rows})")
        text.load("p", left, (rows, block))
        text.load("q", right, (block, columns))
        text.dot("total", "p", "q")
    text.store(result, (rows, columns), f"total.to({result.name}.dtype.element_ty)")
    return Body(tuple(text.lines), (left, right, result), programs)
