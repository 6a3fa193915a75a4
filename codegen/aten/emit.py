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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

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
from tensorize.ir.orders import (
    ContractionPiece,
    ContractionPlan,
    TrainingPiece,
    Tree,
    typical_batch,
)
from tensorize.ir.spec import TTSpec

Piece = TypeVar("Piece", ContractionPiece, TrainingPiece)

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
    lines = [
        *opening("contract", plan.spec, plan.contract, bias=True),
        *flattened("x", plan.spec, sides(plan.spec, plan.contract)[0]),
        *by_rows("x", plan.spec, plan.pieces, lambda piece: _piece(plan, piece)),
    ]
    return with_imports("\n".join(lines) + "\n")


@lru_cache(maxsize=4096)
def build(plan: ContractionPlan) -> Callable[..., Tensor]:
    """Compile what ``emit`` writes, once for each plan. Tracebacks and debuggers show the text."""
    return compiled(emit(plan), "contract")["contract"]


def layouts(plan: ContractionPlan, count: int) -> list[ContractionPlan]:
    """A plan of one piece in its layouts of least predicted time, up to ``count`` of them."""
    (piece,) = plan.pieces
    found = len(_layouts(plan, piece).ranked(piece.tree, sides(plan.spec, plan.contract)[1]))
    pieces = (replace(piece, layout=k) for k in range(min(count, found)))
    return [replace(plan, pieces=(piece,)) for piece in pieces]


def compiled(text: str, kind: str) -> dict[str, Any]:
    """The names that a source text defines."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<tensorize {kind} {digest}>"
    # Without a modification time, linecache never drops the entry.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), namespace)
    return namespace


def with_imports(body: str) -> str:
    imports = "import torch.nn.functional as F\n\n\n" if "F.linear(" in body else ""
    return imports + body


def unpacked(names: Sequence[str]) -> str:
    """Names as the left side of an assignment from a tuple."""
    return ", ".join(names) if len(names) > 1 else f"({names[0]},)"


def opening(name: str, spec: TTSpec, contract: str, *, bias: bool = False) -> list[str]:
    """A function of (x, cores), up to where it has the cores by their names."""
    into, out = (width(spec, axes) for axes in sides(spec, contract))
    experts = f"{spec.shape[0]}, " if spec.batch else ""
    takes = f"({experts}..., {into})"
    unfit = f"x.shape[-1] != {into}"
    if spec.batch:
        unfit = f"x.ndim < 2 or x.shape[0] != {spec.shape[0]} or {unfit}"
    return [
        f"def {name}(x, cores{', bias=None' if bias else ''}):",
        f'    """y = x {"Wᵀ" if contract == "columns" else "W"}{" + bias" if bias else ""}: '
        f"{takes} to ({experts}..., {out}).",
        "",
        f"    W is {spec} of {spec.shape}.",
        f"    Sizes: {', '.join(f'{name}={size}' for name, size in spec.sizes)}.",
        f"    B is the number of rows{' of each expert' if experts else ''}.",
        '    """',
        # A reshape would take a wrong x as well, as other rows.
        f"    if {unfit}:",
        f'        raise ValueError(f"x is {takes}, got {{tuple(x.shape)}}")',
        f"    {unpacked([f'c{k}' for k in range(len(spec.cores))])} = cores",
        "    lead = x.shape[:-1]",
    ]


def flattened(name: str, spec: TTSpec, axes: Axes) -> list[str]:
    """An input with its leading axes as one of rows."""
    experts = f"{spec.shape[0]}, " if spec.batch else ""
    return [f"    {name} = {name}.reshape({experts}-1, {width(spec, axes)})"]


def width(spec: TTSpec, axes: Axes) -> int:
    """The length of one row."""
    return math.prod(spec.size[axis] for axis in axes[len(spec.batch) + 1 :])


def by_rows(
    name: str,
    spec: TTSpec,
    pieces: Sequence[Piece],
    write: Callable[[Piece], list[str]],
) -> list[str]:
    """The pieces' bodies, chosen by the rows of an input."""
    lines = [f"    rows = {name}.shape[{len(spec.batch)}]"] if len(pieces) > 1 else []
    for piece in pieces:
        indent = "    "
        if piece is not pieces[-1]:
            lines.append(f"    if rows <= {piece.last_batch}:")
            indent *= 2
        lines += [indent + line for line in write(piece)]
    return lines


def _piece(plan: ContractionPlan, piece: ContractionPiece) -> list[str]:
    """The straight-line body of one piece."""
    output = sides(plan.spec, plan.contract)[1]
    emitter = Emitter(_layouts(plan, piece))
    last = emitter.layouts.ranked(piece.tree, output)[piece.layout]
    takes_bias = ends_in_outputs(last)
    if takes_bias:
        emitter.reorder_bias(last.blocks[1], output[1:])
    result = emitter.ordered(last, output, "bias" if takes_bias else None)
    result = f"{result}.reshape(*lead, {width(plan.spec, output)})"
    ending = [f"y = {result}", "return y if bias is None else y + bias.to(y.dtype)"]
    return [
        f"# {rows_of(piece)}: {piece.tree}",
        f"# {piece.constant} + {piece.slope} B FLOPs",
        *emitter.body,
        *([f"return {result}"] if takes_bias else ending),
    ]


def _layouts(plan: ContractionPlan, piece: ContractionPiece) -> Layouts:
    x = rows_value(plan.spec, "x", sides(plan.spec, plan.contract)[0])
    batch = typical_batch(piece.first_batch, piece.last_batch)
    return Layouts(plan.spec, batch, {**core_values(plan.spec), "x": x})


def rows_of(piece: ContractionPiece | TrainingPiece) -> str:
    end = "on" if piece.last_batch is None else f"to {piece.last_batch}"
    return f"Rows from {piece.first_batch} {end}"


class Emitter:
    """Writes the statements that compute values, one after the other, into ``body``.

    A value with a name is written where it is first needed, in the layout that suits that best;
    from then on it is a leaf. With ``keep_copies`` copies of inputs and of values with a name are
    leaves too, for what needs them later.
    """

    def __init__(self, layouts: Layouts, *, keep_copies: bool = False) -> None:
        self.layouts, self.keep_copies = layouts, keep_copies
        self.body: list[str] = []
        self.count = 0

    def result(self, tree: Tree, output: Axes, layout: int = 0) -> str:
        """Write what computes a tree; an expression of it with its axes in this order."""
        return self.ordered(self.layouts.ranked(tree, output)[layout], output)

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
        """Write what computes a value, unless it is there; its name.

        With the name of a ``bias``, that is added by the product that computes it.
        """
        product = value.source
        if isinstance(product, int):
            return f"c{product}"
        if isinstance(product, str):
            return product
        left = self.statement(product.left.value)
        right = self.statement(product.right.value)
        name = value.name or f"t{self.count}"
        self.count += value.name is None
        over = f" over {', '.join(product.summed)}" if product.summed else ""
        self.body.append(
            f"# {name} {_named(value.axes)} = {left} {_named(product.left.value.axes)} · "
            f"{right} {_named(product.right.value.axes)}{over}"
        )
        self.body += self.assignment(name, product, left, right, bias)
        if value.name is not None:
            self.layouts.leaves[value.name] = [Value(value.blocks, value.name)]
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
            copy = f"{copy}.reshape({self.shape(view.blocks)})"
            known = self.layouts.leaves.get(view.value.name or name)
            if known is None or not self.keep_copies:
                return copy
            self.body.append(f"{name}_{len(known)} = {copy}")
            known.append(Value(view.blocks, f"{name}_{len(known)}", name=view.value.name or name))
            return str(known[-1].source)
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
