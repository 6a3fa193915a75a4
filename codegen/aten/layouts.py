"""Layouts of what lies between the products of a contraction, and the one that costs least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensorize.ir.orders import Tree
from tensorize.ir.spec import TTSpec

Axes = tuple[str, ...]


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
    FLOPs of a full-rate product.
    """

    blocks: tuple[Axes, ...]
    source: Product | int | str
    price: float = 0

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


def ends_in_outputs(value: Value) -> bool:
    """Whether its last product is one of matrices, with all axes of the output as its columns."""
    if not isinstance(value.source, Product) or not value.source.summed:
        return False
    return len(value.blocks) == 2 and value.blocks[0] == ("B",)


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
    """Finds the products that take the least time; ``leaves`` are the values that are there."""

    def __init__(self, spec: TTSpec, batch: int, leaves: Mapping[int | str, Value]) -> None:
        self.size = {**spec.size, "B": batch}
        self.leaves = leaves

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
        else:
            yield self.leaves[tree]

    def open_axes(self, tree: Tree) -> set[str]:
        """All axes that occur in a subtree; what its parent still sees is among them."""
        if not isinstance(tree, tuple):
            return set(self.leaves[tree].axes)
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
