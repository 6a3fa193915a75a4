"""Contraction plans as torch source: plain text that can be read, then compiled.

Every pairwise contraction becomes one matrix product. Its operands are views where the order of
their axes allows it; where it does not, one of them is copied into order first, and the emitted
line shows that as a ``permute``. Which orders the intermediates get is free, and chosen so that
as little as possible is copied. Two facts, measured on one Zen 5 core, shape that choice:

- Rebuilding a 4096 x 4096 weight of two cores by one GEMM and a permute takes 70 ms, of which the
  permute is over half. A batched product that writes whole column blocks takes 30 ms; it leaves the
  row blocks in another order, which is put right on the output (much smaller than the weight).
- A batched product over an operand whose summed axis is in the middle is as fast as copying it, or
  up to 6 times faster. It is up to 40 times slower where the matrices of the stack are thin: a side
  below 8 (any dtype), or below a quarter of the summed axis (bfloat16).
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from tensorize.ir import ContractionPiece, ContractionPlan, Tree, TTSpec

Axes = tuple[str, ...]

LINE_LENGTH = 92
"""Of an emitted statement without its indentation."""

BATCHED_SIDE, BATCHED_SHARE = 8, 4
"""A batched product is considered where both sides of its matrices are at least BATCHED_SIDE, and
at least the summed size over BATCHED_SHARE."""

TYPICAL_BATCH = 16
"""Rows assumed in weighing copies of the input against copies of cores, where the piece has it."""

KEPT_LAYOUTS = 32
"""Alternatives kept for each intermediate, the cheapest ones: they double with every core."""


@dataclass(frozen=True)
class _Value:
    """An input or an intermediate: a contiguous tensor.

    ``blocks`` are its dimensions, each a run of axes; ``copied`` the elements copied to get it,
    ``batched`` the number of batched products on the way.
    """

    blocks: tuple[Axes, ...]
    source: _Product | int | str
    copied: int = 0
    batched: int = 0

    @property
    def axes(self) -> Axes:
        return sum(self.blocks, ())


@dataclass(frozen=True)
class _View:
    """A value as a matrix, or a stack of them.

    ``reorder`` is the order of axes that it is copied into first, ``None`` where it is a view.
    ``blocks`` are the dimensions that it is then reshaped to and ``roles`` names each of them:
    S of a stack, F free, K summed.
    """

    value: _Value
    reorder: Axes | None
    blocks: tuple[Axes, ...]
    roles: str

    def block(self, role: str) -> Axes:
        return self.blocks[self.roles.index(role)] if role in self.roles else ()


@dataclass(frozen=True)
class _Product:
    """``left`` (S F K) @ ``right`` (S K F) -> (S F F); S may be missing in either."""

    left: _View
    right: _View
    summed: Axes


# ------------------------------------------------------------------------------ public functions


def emit(plan: ContractionPlan) -> str:
    """Source text of ``contract(x, cores)`` for a contraction plan.

    The text stands alone. The function takes x of (..., n) for ``plan.contract == "columns"``
    ((..., m) for ``"rows"``; with experts (experts, ..., n)), with any number of rows, zero
    included, and the cores in ``spec.core_shapes``. It returns (..., m), or (..., n). It is
    differentiable and can be traced; the number of rows alone decides which piece runs.
    """
    spec = plan.spec
    columns = plan.contract == "columns"
    into, out = (spec.shape[-1], spec.shape[-2]) if columns else (spec.shape[-2], spec.shape[-1])
    experts = f"{spec.shape[0]}, " if spec.batch else ""
    names = ", ".join(f"c{k}" for k in range(len(spec.cores)))
    takes = f"({experts}..., {into})"
    lines = [
        "def contract(x, cores):",
        f'    """y = x {"Wᵀ" if columns else "W"}: {takes} to ({experts}..., {out}).',
        "",
        f"    W is {spec} of {spec.shape}.",
        f"    Sizes: {', '.join(f'{name}={size}' for name, size in spec.sizes)}.",
        f"    B is the number of rows{' of each expert' if experts else ''}.",
        '    """',
        # A reshape would take a wrong x as well, as other rows.
        f"    if {_unfit(spec, into)}:",
        f'        raise ValueError(f"x is {takes}, got {{tuple(x.shape)}}")',
        f"    {names if len(spec.cores) > 1 else f'({names},)'} = cores",
        "    lead = x.shape[:-1]",
        f"    x = x.reshape({experts}-1, {into})",
    ]
    if len(plan.pieces) == 1:
        lines += _Emitter(plan, plan.pieces[0]).lines("    ")
    else:
        lines.append(f"    rows = x.shape[{len(spec.batch)}]")
        for piece in plan.pieces:
            if piece.last_batch is None:
                lines += _Emitter(plan, piece).lines("    ")
            else:
                lines.append(f"    if rows <= {piece.last_batch}:")
                lines += _Emitter(plan, piece).lines("        ")
    body = "\n".join(lines) + "\n"
    imports = "import torch.nn.functional as F\n\n\n" if "F.linear(" in body else ""
    return imports + body


@lru_cache(maxsize=4096)
def build(plan: ContractionPlan) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """Compile what ``emit`` writes, once for each plan. Tracebacks and debuggers show the text."""
    text = emit(plan)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<tensorize contract {digest}>"
    # Without a modification time, linecache never drops the entry.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {}
    exec(compile(text, filename, "exec"), namespace)
    return namespace["contract"]


def _unfit(spec: TTSpec, into: int) -> str:
    if not spec.batch:
        return f"x.shape[-1] != {into}"
    return f"x.ndim < 2 or x.shape[0] != {spec.shape[0]} or x.shape[-1] != {into}"


# ----------------------------------------------------------------------------- choosing layouts


class _Layouts:
    """Finds, for one piece, the products that copy the least."""

    def __init__(self, plan: ContractionPlan, piece: ContractionPiece) -> None:
        spec = plan.spec
        columns = plan.contract == "columns"
        last = piece.last_batch or TYPICAL_BATCH
        batch = max(piece.first_batch, min(last, TYPICAL_BATCH))
        self.size = {**spec.size, "B": batch}
        self.spec = spec
        self.x_axes = (*spec.batch, "B", *(spec.columns if columns else spec.rows))
        self.output = (*spec.batch, "B", *(spec.rows if columns else spec.columns))

    def elements(self, axes: Axes) -> int:
        return math.prod(self.size[axis] for axis in axes)

    def same(self, order: Axes, other: Axes) -> bool:
        """Whether a tensor with axes in one order has them in the other: size 1 is anywhere."""
        long, other_long = (
            [axis for axis in axes if axis == "B" or self.size[axis] > 1] for axes in (order, other)
        )
        return long == other_long

    def best(self, tree: Tree) -> _Value:
        """The cheapest way to the output, a last permute included."""

        def price(value: _Value) -> tuple[int, int]:
            permute = 0 if self.same(value.axes, self.output) else self.elements(self.output)
            return value.copied + permute, value.batched

        return min(self.values(tree, set(self.output)), key=price)

    def values(self, tree: Tree, needed: set[str]) -> list[_Value]:
        """Alternatives for a subtree, cheapest first; ``needed`` are the axes used outside it."""
        if isinstance(tree, str):
            # What comes before the columns are dimensions of their own in what the caller passes.
            lead = len(self.spec.batch) + 1
            blocks = (*((axis,) for axis in self.x_axes[:lead]), self.x_axes[lead:])
            return [_Value(blocks, tree)]
        if isinstance(tree, int):
            return [_Value(tuple((axis,) for axis in self.spec.cores[tree]), tree)]
        left, right = tree
        left_axes, right_axes = self.open_axes(left), self.open_axes(right)
        lefts = self.values(left, needed | right_axes)
        rights = self.values(right, needed | left_axes)
        best: dict[Axes, _Value] = {}
        for a in lefts:
            for b in rights:
                for value in self.products(a, b, needed):
                    known = best.get(value.axes)
                    if known is None or (value.copied, value.batched) < (
                        known.copied,
                        known.batched,
                    ):
                        best[value.axes] = value
        found = sorted(best.values(), key=lambda value: (value.copied, value.batched))
        return found[:KEPT_LAYOUTS]

    def open_axes(self, tree: Tree) -> set[str]:
        """All axes that occur in a subtree; what its parent still sees is among them."""
        if isinstance(tree, str):
            return set(self.x_axes)
        if isinstance(tree, int):
            return set(self.spec.cores[tree])
        return self.open_axes(tree[0]) | self.open_axes(tree[1])

    def products(self, a: _Value, b: _Value, needed: set[str]) -> Iterator[_Value]:
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

    def ordered(self, value: _Value, shared: list[str], needed: set[str], *, kept: bool) -> Axes:
        return tuple(axis for axis in value.axes if axis in shared and (axis in needed) is kept)

    def view(self, value: _Value, stack: Axes, summed: Axes) -> _View:
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
        reorder = (*stack, *free, *summed)
        return self.completed(value, reorder, "".join(present), groups)

    def completed(
        self, value: _Value, reorder: Axes | None, roles: str, groups: dict[str, Axes]
    ) -> _View:
        """A matrix has two sides: a group without axes is a side of size 1."""
        if "F" not in roles:
            roles = roles.replace("K", "FK") if "K" in roles else roles + "F"
        if "K" not in roles:
            roles += "K"
        return _View(value, reorder, tuple(groups[role] for role in roles), roles)

    def product(self, left: _View, right: _View, summed: Axes) -> _Value:
        stack = left.block("S") or right.block("S")
        blocks = (*((stack,) if stack else ()), left.block("F"), right.block("F"))
        copied = sum(
            view.value.copied + (self.elements(view.value.axes) if view.reorder else 0)
            for view in (left, right)
        )
        batched = left.value.batched + right.value.batched
        batched += ("S" in left.roles) != ("S" in right.roles)
        return _Value(blocks, _Product(left, right, summed), copied, batched)

    def batched(self, shared: _View, value: _Value, summed: Axes) -> Iterator[_Value]:
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
            view = _View(value, None, blocks, roles)
            sides = (self.elements(view.block("F")), self.elements(shared.block("F")))
            if min(sides) >= max(BATCHED_SIDE, self.elements(summed) // BATCHED_SHARE):
                yield self.product(shared, view, summed)
                yield self.product(view, shared, summed)


def _orders(roles: Sequence[str]) -> Iterator[str]:
    if not roles:
        yield ""
    for role in roles:
        for rest in _orders([other for other in roles if other != role]):
            yield role + rest


# ------------------------------------------------------------------------------ writing the text


class _Emitter:
    """Writes the straight-line body of one piece."""

    def __init__(self, plan: ContractionPlan, piece: ContractionPiece) -> None:
        self.spec: TTSpec = plan.spec
        self.piece = piece
        self.layouts = _Layouts(plan, piece)
        self.body: list[str] = []
        self.count = 0

    def lines(self, indent: str) -> list[str]:
        piece = self.piece
        end = "on" if piece.last_batch is None else f"to {piece.last_batch}"
        self.body = [
            f"# Rows from {piece.first_batch} {end}: {piece.tree}",
            f"# {piece.constant} + {piece.slope} B FLOPs",
        ]
        value = self.layouts.best(piece.tree)
        result = self.statement(value)
        output = self.layouts.output
        if not self.layouts.same(value.axes, output):
            result = self.reordered(result, value, output)
        out = math.prod(self.spec.size[axis] for axis in output[len(self.spec.batch) + 1 :])
        self.body.append(f"return {result}.reshape(*lead, {out})")
        return [indent + line for line in self.body]

    def statement(self, value: _Value) -> str:
        """Write what computes a value, unless it is an input; its name."""
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
        self.body += self.assignment(name, product, left, right)
        return name

    def assignment(self, name: str, product: _Product, left: str, right: str) -> list[str]:
        linear = product.left.roles == product.right.roles == "FK"
        if linear:
            left, right = self.reshaped(left, product.left), self.reshaped(right, product.right)
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

    def turned(self, name: str, view: _View, wanted: str) -> str:
        """The view with its dimensions in the order that the product wants."""
        wanted = "".join(role for role in wanted if role in view.roles)
        text = self.reshaped(name, view)
        if view.roles == wanted:
            return text
        if view.roles[:-2] == wanted[:-2]:
            return f"{text}.mT"
        return f"{text}.permute({', '.join(str(view.roles.index(role)) for role in wanted)})"

    def reshaped(self, name: str, view: _View) -> str:
        if view.reorder is not None:
            name = self.reordered(name, view.value, view.reorder)
        elif view.value.blocks == view.blocks:
            return name
        return f"{name}.reshape({self.shape(view.blocks)})"

    def reordered(self, name: str, value: _Value, order: Axes) -> str:
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
