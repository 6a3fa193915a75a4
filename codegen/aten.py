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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from tensorize.ir import (
    ContractionPiece,
    ContractionPlan,
    TrainingPiece,
    TrainingStep,
    Tree,
    TTSpec,
    typical_batch,
)

Axes = tuple[str, ...]
Piece = TypeVar("Piece", ContractionPiece, TrainingPiece)

LINE_LENGTH = 92
"""Of an emitted statement without its indentation."""

COPIED, STARTED = 100, 200_000
"""FLOPs that a full-rate product does while an element is copied, and while a call starts."""

HALF_RATE, NARROW, NARROW_HALF_RATE = 10, 16, 40
"""A product runs at half its rate where a side or the summed size is HALF_RATE, and where it has
fewer columns than NARROW (but several) at the rate of NARROW_HALF_RATE."""

KEPT_LAYOUTS = 32
"""Alternatives kept for each intermediate, the cheapest ones: they double with every core."""


@dataclass(frozen=True)
class Value:
    """An input or an intermediate: a contiguous tensor.

    ``blocks`` are its dimensions, each a run of axes; ``price`` the predicted time to get it, in
    FLOPs of a full-rate product. ``name``: where it has one.
    """

    blocks: tuple[Axes, ...]
    source: Product | int | str
    price: float = 0
    name: str | None = None

    @property
    def axes(self) -> Axes:
        return sum(self.blocks, ())


@dataclass(frozen=True)
class View:
    """A value as a matrix, or a stack of them.

    ``reorder`` is the order of axes that it is copied into first, ``None`` where it is a view.
    ``blocks`` are the dimensions that it is then reshaped to and ``roles`` names each of them:
    S of a stack, F free, K summed.
    """

    value: Value
    reorder: Axes | None
    blocks: tuple[Axes, ...]
    roles: str

    def block(self, role: str) -> Axes:
        return self.blocks[self.roles.index(role)] if role in self.roles else ()


@dataclass(frozen=True)
class Product:
    """``left`` (S F K) @ ``right`` (S K F) -> (S F F); S may be missing in either."""

    left: View
    right: View
    summed: Axes


# ------------------------------------------------------------------------------ public functions


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


def ends_in_outputs(value: Value) -> bool:
    """Whether its last product is one of matrices, with all axes of the output as its columns."""
    if not isinstance(value.source, Product) or not value.source.summed:
        return False
    return len(value.blocks) == 2 and value.blocks[0] == ("B",)


def rows_of(piece: ContractionPiece | TrainingPiece) -> str:
    end = "on" if piece.last_batch is None else f"to {piece.last_batch}"
    return f"Rows from {piece.first_batch} {end}"


def sides(spec: TTSpec, contract: str) -> tuple[Axes, Axes]:
    """The axes of the input and of the output."""
    inner, outer = (spec.columns, spec.rows)
    if contract == "rows":
        inner, outer = outer, inner
    return (*spec.batch, "B", *inner), (*spec.batch, "B", *outer)


def core_values(spec: TTSpec) -> dict[int | str, Value]:
    return {k: Value(tuple((axis,) for axis in core), k) for k, core in enumerate(spec.cores)}


def rows_value(spec: TTSpec, name: str, axes: Axes) -> Value:
    """An input as (B, …), where there are experts as (experts, B, …)."""
    # What comes before the columns are dimensions of their own in what the caller passes.
    lead = len(spec.batch) + 1
    return Value((*((axis,) for axis in axes[:lead]), axes[lead:]), name)


# ----------------------------------------------------------------------------- choosing layouts


class Layouts:
    """Finds the products that take the least time.

    ``leaves`` are the values that are there (several where a copy in another order is there too),
    ``steps`` trees with a name that stand in others.
    """

    def __init__(
        self,
        spec: TTSpec,
        batch: int,
        leaves: Mapping[int | str, Value],
        steps: Mapping[str, TrainingStep] | None = None,
    ) -> None:
        self.size = {**spec.size, "B": batch}
        self.leaves = {leaf: [value] for leaf, value in leaves.items()}
        self.steps = steps or {}

    def elements(self, axes: Axes) -> int:
        return math.prod(self.size[axis] for axis in axes)

    def same(self, order: Axes, other: Axes) -> bool:
        """Whether a tensor with axes in one order has them in the other: size 1 is anywhere."""
        long, other_long = (
            [axis for axis in axes if axis == "B" or self.size[axis] > 1] for axes in (order, other)
        )
        return long == other_long

    def ranked(self, tree: Tree, output: Axes) -> list[Value]:
        """The ways to the output, cheapest first, a last permute included."""

        def price(value: Value) -> float:
            return value.price + (0 if self.same(value.axes, output) else self.copying(output))

        return sorted(dict.fromkeys(self.ways(tree, set(output))), key=price)

    def values(self, tree: Tree, needed: set[str]) -> list[Value]:
        """The cheapest way to a subtree in each order of its axes, the cheapest first.

        ``needed`` are the axes used outside it.
        """
        best: dict[Axes, Value] = {}
        for value in self.ways(tree, needed):
            known = best.get(value.axes)
            if known is None or value.price < known.price:
                best[value.axes] = value
        return sorted(best.values(), key=lambda value: value.price)[:KEPT_LAYOUTS]

    def ways(self, tree: Tree, needed: set[str]) -> Iterator[Value]:
        """Every last product of a subtree, from the cheapest ways to its two parts."""
        if isinstance(tree, tuple):
            left, right = tree
            lefts = self.values(left, needed | self.open_axes(right))
            rights = self.values(right, needed | self.open_axes(left))
            for a in lefts:
                for b in rights:
                    yield from self.products(a, b, needed)
        elif tree in self.leaves:
            yield from self.leaves[tree]
        else:
            step = self.steps[str(tree)]
            for value in self.ways(step.tree, set(step.axes)):
                yield replace(value, name=step.name)

    def open_axes(self, tree: Tree) -> set[str]:
        """All axes that occur in a subtree; what its parent still sees is among them."""
        if not isinstance(tree, tuple):
            known = self.leaves.get(tree)
            return set(self.steps[str(tree)].axes if known is None else known[0].axes)
        return self.open_axes(tree[0]) | self.open_axes(tree[1])

    def products(self, a: Value, b: Value, needed: set[str]) -> Iterator[Value]:
        """Every way to multiply two values by one (batched) matrix product."""
        shared = [axis for axis in a.axes if axis in b.axes]
        stacks = {self.ordered(v, shared, needed, kept=True) for v in (a, b)}
        sums = {self.ordered(v, shared, needed, kept=False) for v in (a, b)}
        for stack in sorted(stacks):
            for summed in sorted(sums):
                view_a = self.view(a, stack, summed)
                view_b = self.view(b, stack, summed)
                yield self.product(view_a, view_b, summed)
                yield self.product(view_b, view_a, summed)
                if not stack:
                    yield from self.batched(view_a, b, summed)
                    yield from self.batched(view_b, a, summed)

    def ordered(self, value: Value, shared: list[str], needed: set[str], *, kept: bool) -> Axes:
        return tuple(axis for axis in value.axes if axis in shared and (axis in needed) is kept)

    def view(self, value: Value, stack: Axes, summed: Axes) -> View:
        """The value as (stacks of) matrices: a view if each group of axes stands together."""
        free = tuple(axis for axis in value.axes if axis not in stack and axis not in summed)
        groups = {"S": stack, "F": free, "K": summed}
        present = [role for role in "SFK" if groups[role]]
        for roles in _orders(present):
            # A matrix of which neither side is contiguous would be copied by the product.
            if roles[-1:] == "S" and len(roles) > 1:
                continue
            if self.same(sum((groups[role] for role in roles), ()), value.axes):
                return self.completed(value, None, roles, groups)
        # A stack is copied in runs of the last axis where that can stay the last.
        if stack and summed and value.axes[-1] in free:
            present = [role for role in "SKF" if groups[role]]
        reorder = sum((groups[role] for role in present), ())
        return self.completed(value, reorder, "".join(present), groups)

    def completed(
        self, value: Value, reorder: Axes | None, roles: str, groups: dict[str, Axes]
    ) -> View:
        """A matrix has two sides: a group without axes is a side of size 1."""
        if "F" not in roles:
            roles = roles.replace("K", "FK") if "K" in roles else roles + "F"
        if "K" not in roles:
            roles += "K"
        return View(value, reorder, tuple(groups[role] for role in roles), roles)

    def product(self, left: View, right: View, summed: Axes) -> Value:
        stack = left.block("S") or right.block("S")
        blocks = (*((stack,) if stack else ()), left.block("F"), right.block("F"))
        price = sum(
            view.value.price + (self.copying(view.value.axes) if view.reorder else 0)
            for view in (left, right)
        )
        price += self.multiplying(stack, left.block("F"), summed, right.block("F"))
        return Value(blocks, Product(left, right, summed), price)

    def copying(self, axes: Axes) -> float:
        return STARTED + COPIED * self.elements(axes)

    def multiplying(self, stack: Axes, rows: Axes, summed: Axes, columns: Axes) -> float:
        flops = 2.0 * self.elements(stack)
        for axes in (rows, summed, columns):
            size = self.elements(axes)
            narrow = axes is columns and 1 < size < NARROW
            flops *= size + (NARROW_HALF_RATE if narrow else HALF_RATE)
        return STARTED + flops

    def batched(self, shared: View, value: Value, summed: Axes) -> Iterator[Value]:
        """One matrix times a stack of matrices: free axes of ``value`` become the stack.

        This needs no copy where the summed axes stand in the middle, and it is the way to put the
        free axes of the other operand between those of this one.
        """
        axes = value.axes
        start = next((k for k in range(len(axes)) if axes[k : k + len(summed)] == summed), None)
        if start is None or not summed:
            return
        before, after = axes[:start], axes[start + len(summed) :]
        options: list[tuple[str, tuple[Axes, ...]]] = []
        if before and after:
            options.append(("SKF", (before, summed, after)))
        elif after:
            options += [("KSF", (summed, after[:k], after[k:])) for k in range(1, len(after))]
        elif before:
            options += [("FSK", (before[:k], before[k:], summed)) for k in range(1, len(before))]
        for roles, blocks in options:
            view = View(value, None, blocks, roles)
            yield self.product(shared, view, summed)
            yield self.product(view, shared, summed)


def _orders(roles: Sequence[str]) -> Iterator[str]:
    if not roles:
        yield ""
    for role in roles:
        for rest in _orders([other for other in roles if other != role]):
            yield role + rest


# ------------------------------------------------------------------------------ writing the text


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
