"""Contraction plans as torch source: plain text that can be read, then compiled.

Every pairwise contraction becomes one matrix product. Its operands are views where the order of
their axes allows it; where it does not, one of them is copied into order first, and the emitted
line shows that as a ``permute``. Which orders the intermediates get is free, and chosen by
predicted time: copies cost by their elements, products by their FLOPs and their shapes. What was
measured on one core (Zen 3 and Zen 5) shapes that choice:

- Rebuilding a 4096 x 4096 weight of two cores by one GEMM and a permute takes 70 ms, of which the
  permute is over half. A batched product that writes whole column blocks takes 30 ms; it leaves the
  row blocks in another order, which is put right on the output (much smaller than the weight).
- A batched product over an operand whose summed axis is in the middle is as fast as copying it, or
  up to 6 times faster. Where its matrices are thin (one row: a decoder's) it is up to 8 times
  slower than a copy and one product of all of them.

The prediction is good enough to leave out what is bad, not to tell the best few apart: ``layouts``
gives those to whoever times them.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from tensorize.codegen.aten.layouts import (
    Axes,
    Layouts,
    Product,
    Value,
    View,
    core_values,
    ends_in_outputs,
    rows_value,
    sides,
)
from tensorize.ir.orders import ContractionPiece, ContractionPlan, typical_batch
from tensorize.ir.spec import TTSpec

LINE_LENGTH = 92
"""Of an emitted statement without its indentation."""


def emit(plan: ContractionPlan) -> str:
    """Source text of ``contract(x, cores, bias=None)`` for a contraction plan.

    The text stands alone. The function takes x of (..., n) for ``plan.contract == "columns"``
    ((..., m) for ``"rows"``; with experts (experts, ..., n)), with any number of rows, zero
    included, and the cores in ``spec.core_shapes``. It returns (..., m), or (..., n), to which a
    bias is added: by the last product, where its columns are all of the outputs. It is
    differentiable and can be traced; the number of rows alone decides which piece runs.
    """
    body = "\n".join([*_opening(plan.spec, plan.contract), *_by_rows(plan)]) + "\n"
    return ("import torch.nn.functional as F\n\n\n" if "F.linear(" in body else "") + body


@lru_cache(maxsize=4096)
def build(plan: ContractionPlan) -> Callable[..., Tensor]:
    """Compile what ``emit`` writes, once for each plan. Tracebacks and debuggers show the text."""
    text = emit(plan)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<tensorize contract {digest}>"
    # Without a modification time, linecache never drops the entry.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), namespace)
    return namespace["contract"]


def layouts(plan: ContractionPlan, count: int) -> list[ContractionPlan]:
    """A plan of one piece in its layouts of least predicted time, up to ``count`` of them."""
    (piece,) = plan.pieces
    found = len(_layouts(plan, piece).ranked(piece.tree, sides(plan.spec, plan.contract)[1]))
    pieces = (replace(piece, layout=k) for k in range(min(count, found)))
    return [replace(plan, pieces=(piece,)) for piece in pieces]


def _opening(spec: TTSpec, contract: str) -> list[str]:
    """A function of (x, cores, bias), up to where it has cores by their names, and x as rows."""
    into, out = (_width(spec, axes) for axes in sides(spec, contract))
    experts = f"{spec.shape[0]}, " if spec.batch else ""
    takes = f"({experts}..., {into})"
    unfit = f"x.shape[-1] != {into}"
    if spec.batch:
        unfit = f"x.ndim < 2 or x.shape[0] != {spec.shape[0]} or {unfit}"
    names = [f"c{k}" for k in range(len(spec.cores))]
    return [
        "def contract(x, cores, bias=None):",
        f'    """y = x {"Wᵀ" if contract == "columns" else "W"} + bias: '
        f"{takes} to ({experts}..., {out}).",
        "",
        f"    W is {spec} of {spec.shape}.",
        f"    Sizes: {', '.join(f'{name}={size}' for name, size in spec.sizes)}.",
        f"    B is the number of rows{' of each expert' if experts else ''}.",
        '    """',
        # A reshape would take a wrong x as well, as other rows.
        f"    if {unfit}:",
        f'        raise ValueError(f"x is {takes}, got {{tuple(x.shape)}}")',
        f"    {', '.join(names) if len(names) > 1 else f'({names[0]},)'} = cores",
        "    lead = x.shape[:-1]",
        f"    x = x.reshape({experts}-1, {into})",
    ]


def _width(spec: TTSpec, axes: Axes) -> int:
    """The length of one row."""
    return math.prod(spec.size[axis] for axis in axes[len(spec.batch) + 1 :])


def _by_rows(plan: ContractionPlan) -> list[str]:
    """The pieces' bodies, chosen by the rows of x."""
    *others, last = plan.pieces
    lines = [f"    rows = x.shape[{len(plan.spec.batch)}]"] if others else []
    for piece in others:
        lines.append(f"    if rows <= {piece.last_batch}:")
        lines += ["        " + line for line in _piece(plan, piece)]
    return [*lines, *("    " + line for line in _piece(plan, last))]


def _piece(plan: ContractionPlan, piece: ContractionPiece) -> list[str]:
    """The straight-line body of one piece."""
    output = sides(plan.spec, plan.contract)[1]
    emitter = _Emitter(_layouts(plan, piece))
    last = emitter.layouts.ranked(piece.tree, output)[piece.layout]
    takes_bias = ends_in_outputs(last)
    if takes_bias:
        emitter.reorder_bias(last.blocks[1], output[1:])
    result = emitter.ordered(last, output, "bias" if takes_bias else None)
    result = f"{result}.reshape(*lead, {_width(plan.spec, output)})"
    ending = [f"y = {result}", "return y if bias is None else y + bias.to(y.dtype)"]
    end = "on" if piece.last_batch is None else f"to {piece.last_batch}"
    return [
        f"# Rows from {piece.first_batch} {end}: {piece.tree}",
        f"# {piece.constant} + {piece.slope} B FLOPs",
        *emitter.body,
        *([f"return {result}"] if takes_bias else ending),
    ]


def _layouts(plan: ContractionPlan, piece: ContractionPiece) -> Layouts:
    x = rows_value(plan.spec, "x", sides(plan.spec, plan.contract)[0])
    batch = typical_batch(piece.first_batch, piece.last_batch)
    return Layouts(plan.spec, batch, {**core_values(plan.spec), "x": x})


class _Emitter:
    """Writes the statements that compute values, one after the other, into ``body``."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.body: list[str] = []
        self.count = 0

    def ordered(self, value: Value, output: Axes, bias: str | None = None) -> str:
        """Write what computes a value; an expression of it with its axes in this order."""
        name = self.statement(value, bias)
        if not self.layouts.same(value.axes, output):
            return self.reordered(name, value, output)
        return name

    def reorder_bias(self, axes: Axes, output: Axes) -> None:
        """Write what brings the bias, which has the output's axes, into the order of others."""
        if not self.layouts.same(axes, output):
            turned = self.reordered("bias", Value((output,), "bias"), axes)
            self.body.append(f"bias = None if bias is None else {turned}.reshape(-1)")

    def statement(self, value: Value, bias: str | None = None) -> str:
        """Write what computes a value, unless it is given; its name.

        With the name of a ``bias``, that is added by the product that computes it.
        """
        product = value.source
        if isinstance(product, int):
            return f"c{product}"
        if isinstance(product, str):
            return product
        left = self.statement(product.left.value)
        right = self.statement(product.right.value)
        name = f"t{self.count}"
        self.count += 1
        over = f" over {', '.join(product.summed)}" if product.summed else ""
        self.body.append(
            f"# {name} {_named(value.axes)} = {left} {_named(product.left.value.axes)} · "
            f"{right} {_named(product.right.value.axes)}{over}"
        )
        self.body += self.assignment(name, product, left, right, bias)
        return name

    def assignment(
        self, name: str, product: Product, left: str, right: str, bias: str | None = None
    ) -> list[str]:
        linear = bias is not None or product.left.roles == product.right.roles == "FK"
        if linear:
            left = self.turned(left, product.left, "FK")
            right = self.turned(right, product.right, "FK")
            right += f", {bias}" if bias else ""
            line = f"{name} = F.linear({left}, {right})"
        else:
            left = self.turned(left, product.left, "SFK")
            right = self.turned(right, product.right, "SKF")
            line = f"{name} = {left} @ {right}"
        if len(line) <= LINE_LENGTH:
            return [line]
        if linear:
            return [f"{name} = F.linear(", f"    {left},", f"    {right},", ")"]
        return [f"{name} = (", f"    {left}", f"    @ {right}", ")"]

    def turned(self, name: str, view: View, wanted: str) -> str:
        """The view with its dimensions in the order that the product wants."""
        wanted = "".join(role for role in wanted if role in view.roles)
        text = self.reshaped(name, view)
        if view.roles == wanted:
            return text
        if view.roles[:-2] == wanted[:-2]:
            return f"{text}.mT"
        return f"{text}.permute({', '.join(str(view.roles.index(role)) for role in wanted)})"

    def reshaped(self, name: str, view: View) -> str:
        if view.reorder is not None:
            copy = self.reordered(name, view.value, view.reorder)
            return f"{copy}.reshape({self.shape(view.blocks)})"
        if view.value.blocks == view.blocks:
            return name
        return f"{name}.reshape({self.shape(view.blocks)})"

    def reordered(self, name: str, value: Value, order: Axes) -> str:
        """Axes taken apart and permuted; the reshape that follows copies."""
        axes = value.axes
        single = tuple((axis,) for axis in axes)
        if value.blocks != single:
            name = f"{name}.reshape({self.shape(single)})"
        return f"{name}.permute({', '.join(str(axes.index(axis)) for axis in order)})"

    def shape(self, blocks: tuple[Axes, ...]) -> str:
        return ", ".join(
            "-1" if "B" in block else str(self.layouts.elements(block)) for block in blocks
        )


def _named(axes: Axes) -> str:
    return f"({', '.join(axes)})"
