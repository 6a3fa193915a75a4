"""How one launch of a kernel is cut, and what the indices of its cores do there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensorize.codegen.triton.text import DOT, power, quotient
from tensorize.formats.registry import format_of
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work

MOST_RANK = 512
"""Of low rank, of all weights of one result, where the intermediate stays on chip: more does not
fit into registers on every target, and there is little to lose (from 190 on, fusing two library
matmuls saves 4 % at most, docs/measured/codegen.md). Kernels for few rows have no such limit."""
MOST_INNER_RANK, MOST_CORES = 64, 4
"""Of chains: above, library matmuls win (docs/measured/codegen.md)."""
CHUNK = 256
"""The widest accumulator of one dot."""


class NotCovered(ValueError):
    """No kernel family computes this; library matmuls do."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: ``rows`` of x, summed entries (``inner``) and outputs (``outer``) held
    at a time, the ``slice`` of outputs that one program goes through, warps, and pipeline stages.

    ``rank`` and ``inner_slice`` are of ``decode``: what one program takes of the rank and of the
    summed entries.
    """

    rows: int = 64
    inner: int = 64
    outer: int = 64
    slice: int = 1 << 30
    rank: int = 64
    inner_slice: int = 1 << 30
    warps: int = 4
    stages: int = 3


# --------------------------------------------------------------------------- roles of the indices


@dataclass(frozen=True)
class Roles:
    """What two cores' indices do when x meets first one, then the other.

    ``inner`` and ``link`` are summed by dots, ``outer`` is what the second leaves; ``loops`` are
    summed one by one, and every entry of ``grid`` is a program of its own.
    """

    first: int
    second: int
    x: tuple[str, ...]
    y: tuple[str, ...]
    inner: str
    link: str
    outer: str
    loops: tuple[str, ...]
    grid: tuple[str, ...]

    @property
    def saved(self) -> tuple[str, ...]:
        return (*self.grid, *self.loops, self.link)


def sides(spec: TTSpec, contract: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of x and of y."""
    if contract not in ("columns", "rows"):
        raise ValueError(f"contract is 'columns' or 'rows', got {contract!r}")
    return (spec.columns, spec.rows) if contract == "columns" else (spec.rows, spec.columns)


def suffix(work: Work, k: int) -> str:
    """What tells the operands of several weights apart."""
    return f"_{k}" if len(work.specs) > 1 else ""


def roles(spec: TTSpec, contract: str) -> Roles:
    """The roles of a two-core spec, read from its named indices alone.

    Raises:
        NotCovered: no order of the cores has one index to sum first and one to leave last.
    """
    x, y = sides(spec, contract)
    if len(spec.cores) == 2 and not spec.batch:
        # So that x meets first what the gradient of y meets last, and both intermediates serve.
        orders = ((1, 0), (0, 1)) if contract == "columns" else ((0, 1), (1, 0))
        for first, second in orders:
            a, b = spec.cores[first], spec.cores[second]
            inner = [axis for axis in x if axis in a and axis not in b]
            outer = [axis for axis in y if axis in b and axis not in a]
            link = [axis for axis in a if axis in b and axis not in (*x, *y)]
            if len(inner) == len(outer) == len(link) == 1:
                loops = tuple(axis for axis in x if axis != inner[0])
                grid = tuple(axis for axis in y if axis != outer[0])
                return Roles(first, second, x, y, inner[0], link[0], outer[0], loops, grid)
    raise NotCovered(f"{spec} has no two cores that x meets one after the other")


def chunks(rank: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of the accumulators that a rank is cut into, each a power of two.

    Padding to one power of two would waste up to half; the last two parts waste little.
    """
    found: list[tuple[int, int]] = []
    start = 0
    while rank - start >= CHUNK:
        found.append((start, CHUNK))
        start += CHUNK
    rest = DOT * quotient(rank - start, DOT)
    if rest:
        whole, half = power(rest, DOT), power(rest, DOT) // 2
        if half >= DOT and half + power(rest - half, DOT) < whole:
            found += [(start, half), (start + half, power(rest - half, DOT))]
        else:
            found.append((start, whole))
    return tuple(found)


def is_pair(spec: TTSpec) -> bool:
    """Two matrices, which x meets one after the other."""
    return format_of(spec).kernels == "pair"


def is_small_chain(spec: TTSpec) -> bool:
    """A tensor train that the families take; low rank is none."""
    return (
        format_of(spec).kernels == "chain"
        and not spec.batch
        and 2 <= len(spec.cores) <= MOST_CORES
        and max(spec.ranks) <= MOST_INNER_RANK
    )


def check(work: Work) -> None:
    """Raises NotCovered where no family computes the work."""
    for spec in work.specs:
        if spec.batch:
            raise NotCovered(f"{spec} is a stack of experts")
        apart = work.gated and not work.shared
        if spec.pivoted and (work.contract != "columns" or work.saved or apart):
            raise NotCovered(f"{spec} has an order: x alone is read by it, by one first factor")
        if spec.pivoted and spec.shape[-1] == spec.ranks[0]:
            raise NotCovered(f"{spec} has no second factor")
        if any(math.prod(shape) >= 1 << 31 for shape in spec.core_shapes):
            raise NotCovered(f"a core of {spec} has more entries than 32 bits count")
        if not is_pair(spec) and not is_small_chain(spec):
            raise NotCovered(f"{spec} is no chain of 2 to 4 cores of ranks to {MOST_INNER_RANK}")
        if len(spec.cores) == 2:
            roles(spec, work.contract)
    low_rank = all(map(is_pair, work.specs))
    if not low_rank and (len(work.specs) > 1 or work.norm is not None):
        raise NotCovered("norms and several weights of one input: low rank only")
    if work.gated and len(work.specs) != 2:
        raise NotCovered("a gated product takes two weights")
    if work.shared and (not low_rank or work.contract != "columns" or work.saved):
        raise NotCovered("one first factor for several weights: low rank without gradients only")
    if work.shared and len({spec.ranks for spec in work.specs}) != 1:
        raise NotCovered("weights with one first factor have one rank")
    if len({spec.shape[-1 if work.contract == "columns" else -2] for spec in work.specs}) != 1:
        raise NotCovered("the weights of one launch read one x")


def held_at_once(work: Work) -> tuple[TTSpec, ...]:
    """The low-rank weights whose products with x one program holds: of those that are apart, the
    one of the highest rank."""
    if work.gated and not work.shared:
        return work.specs
    return (max(work.specs, key=lambda spec: spec.ranks[0]),)


def check_on_chip(work: Work) -> None:
    """Raises NotCovered where the intermediates of 16 rows do not fit into registers."""
    held = sum(spec.ranks[0] for spec in held_at_once(work))
    if held > MOST_RANK:
        raise NotCovered(f"a rank of {held} is more than the {MOST_RANK} that fit on chip")


def flops_a_row(spec: TTSpec, contract: str) -> int:
    """What the kernels compute for one row of x, padding apart: the cores one after the other."""
    x, y = sides(spec, contract)
    if len(spec.cores) == 2:
        role = roles(spec, contract)
        times = math.prod(spec.size[axis] for axis in (*role.grid, *role.loops, role.link))
        kept = spec.ranks[0] if spec.pivoted else 0  # columns that are added, not multiplied
        return 2 * times * (spec.size[role.inner] - kept + spec.size[role.outer])
    open_axes, total = set(x), 0
    for core in reversed(spec.cores):
        touched = open_axes | set(core)
        total += 2 * math.prod(spec.size[axis] for axis in touched)
        open_axes = {a for a in touched if a in y or (a in open_axes) != (a in core)}
    return total
