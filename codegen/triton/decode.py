"""Low rank for few rows, in one launch and without programs that wait for each other.

y = Σ over slices of the rank and of the summed entries of (x first) second: linear, so a program
takes one slice of each, and one of the outputs, and writes its share of y to a workspace. A counter
for each slice of outputs tells the last program to arrive; that one adds the shares up, always in
the same order, so results are the same bit for bit. Nothing waits: it is right on every device, in
CUDA graphs, and beside other kernels. The counter is left as it was found, at zero.

Every wave of threads counts for itself: its release waits for its own stores. A barrier and the
release of one thread would do on NVIDIA, but not on AMD, where neither waits for other waves'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tensorize.codegen.triton import guard
from tensorize.codegen.triton.guard import Check, Outputs
from tensorize.codegen.triton.module import Body, Source, assemble, row_block, title
from tensorize.codegen.triton.pair import (
    apply_norm,
    core,
    epilogue,
    inner_loop,
    operands,
    scale_of,
    start_norm,
)
from tensorize.codegen.triton.roles import NotCovered, Tiles, is_pair, roles, suffix
from tensorize.codegen.triton.text import DOT, Axis, Dimension, Lines, Operand, power, quotient
from tensorize.ir.work import Work

AT_ONCE = 8
"""Shares that are loaded together: one by one each would take a round trip to the second cache."""


def decode(work: Work, tiles: Tiles) -> Source:
    """As ``triton_pair.forward``, for few rows."""
    if not all(map(is_pair, work.specs)) or work.saved:
        raise NotCovered("few rows: low rank without gradients only")
    if work.norm is not None and work.norm.kind != "rms":
        raise NotCovered("few rows: no layer norm")
    groups = [(0, 1)] if work.gated else [(k,) for k in range(len(work.specs))]
    cuts = [_Cut(work, tiles, group) for group in groups]
    counters = sum(cut.slices for cut in cuts)
    checked = [
        _checked(work, cut, k) for group, cut in zip(groups, cuts, strict=True) for k in group
    ]
    bodies, scratch, first = [], {}, 0
    for group, cut in zip(groups, cuts, strict=True):
        bodies.append(_body(work, tiles, group, cut, first, counters, checked))
        first += cut.slices
        for k in group:
            scratch[f"shares{suffix(work, k)}"] = f"{cut.shares}, rows, {work.outs[k]}"
        if work.norm is not None:
            end = suffix(work, group[0])
            scratch[f"norms{end}"] = f"{cut.slices}, {cut.inner_slices}, rows"
        if work.guarded:
            end, sums = suffix(work, group[0]), len(group) + 1
            scratch[f"checks{end}"] = f"{cut.slices}, {sums}, {cut.inner_slices}, rows"
    inputs, outputs = operands(work)
    inputs += guard.operands(work, checked)
    what = "y = (x c1ᵀ) c0ᵀ for few rows" if work.contract == "columns" else "y = (x c0) c1"
    return assemble(
        "decode",
        title(work, f"{what}: shares of slices, added up by the last program to arrive"),
        bodies,
        inputs=inputs,
        outputs=outputs,
        tiles=tiles,
        scratch=scratch,
        counters=counters,
        checked=checked,
    )


def _checked(work: Work, cut: _Cut, k: int) -> Outputs:
    size, role = work.specs[k].size, roles(work.specs[k], work.contract)
    axes = tuple((axis, size[axis]) for axis in role.y)
    return Outputs(axes, cut.slices, (), cut.outer, cut.outer_slice)


class _Cut:
    """How many slices there are of outputs, of the rank and of the summed entries."""

    def __init__(self, work: Work, tiles: Tiles, group: Sequence[int]) -> None:
        role = roles(work.specs[0], work.contract)
        sizes = work.specs[group[0]].size
        self.inner, self.outer = role.inner, role.outer
        self.inner_size, self.outer_size = sizes[role.inner], sizes[role.outer]
        self.inner_tile = min(tiles.inner, power(self.inner_size, DOT))
        self.outer_tile = min(tiles.outer, power(self.outer_size, DOT))
        rank = max(work.specs[k].ranks[0] for k in group)
        self.rank_tile = min(tiles.rank, power(rank, DOT))
        wanted = self.inner_tile * quotient(tiles.inner_slice, self.inner_tile)
        self.inner_slices = quotient(self.inner_size, wanted)
        self.inner_slice = self.inner_tile * quotient(self.inner_size, self.inner_tile)
        if self.inner_slices > 1:
            self.inner_slice = wanted
        self.outer_slice = self.outer_tile * quotient(
            min(tiles.slice, self.outer_size), self.outer_tile
        )
        self.slices = quotient(self.outer_size, self.outer_slice)
        self.rank_slices = quotient(rank, self.rank_tile)
        self.shares = self.rank_slices * self.inner_slices


def _body(
    work: Work,
    tiles: Tiles,
    group: Sequence[int],
    cut: _Cut,
    first_counter: int,
    counters: int,
    checked: Sequence[Outputs],
) -> Body:
    role = roles(work.specs[0], work.contract)
    known = {o.name: o for part in operands(work) for o in part}
    end = "" if work.gated else suffix(work, group[0])
    # 64 bits for masks as well took registers enough for ptxas to spill an address.
    block = (Axis("b", "b", "rows", narrow=True),)
    shares = {
        k: Operand(
            f"shares{suffix(work, k)}",
            (("share", f"rows * {work.outs[k]}"), ("b", work.outs[k]), (cut.outer, 1)),
            "float32",
        )
        for k in group
    }
    norms = Operand(
        f"norms{suffix(work, group[0])}",
        (("piece", f"{cut.inner_slices} * rows"), ("inner_slice", "rows"), ("b", 1)),
        "float32",
    )
    text = Lines()
    row_block(text, tiles, narrow=True)
    many = f"{cut.slices} slices of outputs, {cut.rank_slices} of the rank"
    text.note(f"{many}, {cut.inner_slices} of the summed entries.")
    check = Check(text, work, group, checked, tiles.rows)
    text(f"piece = part % {cut.slices}")
    text(f"share = part // {cut.slices}")
    text(f"rank_slice = share % {cut.rank_slices}")
    if cut.inner_slices > 1 or work.norm is not None or work.guarded:
        text(f"inner_slice = share // {cut.rank_slices}")
    text.vector("r", f"rank_slice * {cut.rank_tile}", cut.rank_tile)
    heads = group[:1] if work.shared else group
    for k in heads:
        text.zeros(_name("t", heads, k), tiles.rows, cut.rank_tile)
    start_norm(text, work, tiles.rows)
    check.start("piece")
    inner_limit = cut.inner_size if cut.inner_size % cut.inner_tile else None
    inner = (Axis(cut.inner, cut.inner, inner_limit),)
    if cut.inner_slices > 1:
        text(f"low = inner_slice * {cut.inner_slice}")
        high = f"low + {cut.inner_slice}"
        if cut.inner_size % cut.inner_slice:
            high = f"min({high}, {cut.inner_size})"
        bounds = ("low", high)
    else:
        bounds = ("0", str(cut.inner_size))
    used = [known["x"]]
    with inner_loop(text, cut.inner, *bounds, cut.inner_tile, cut.inner_size):
        text.load("x_tile", known["x"], (block, inner))
        apply_norm(text, work, role, inner)
        check.meet(inner)
        for k in heads:
            first = core(work, k, role.first)
            text.load("first", first, (inner, _rank(work, cut, k)))
            text.dot(_name("t", heads, k), "x_tile", "first")
            used.append(first)
    if work.norm is not None:
        text.note("Scaled by what this program saw, so that float16 holds it.")
        text(f"seen = {scale_of(work)}")
    for k in heads:
        t = _name("t", heads, k)
        scaled = f"({t} * seen[:, None])" if work.norm is not None else t
        text(f"{t} = {scaled}.to(x.dtype.element_ty)")
    text(f"low_output = piece * {cut.outer_slice}")
    last = f"low_output + {cut.outer_slice}"
    if cut.outer_size % cut.outer_slice:
        last = f"min({last}, {cut.outer_size})"
    outer_limit = cut.outer_size if cut.outer_size % cut.outer_tile else None
    outer = (Axis(cut.outer, cut.outer, outer_limit),)
    with inner_loop(text, cut.outer, "low_output", last, cut.outer_tile, cut.outer_size):
        for k in group:
            second = core(work, k, role.second)
            used.append(second)
            text.load("second", second, (_rank(work, cut, k), outer))
            text.zeros("y_tile", tiles.rows, cut.outer_tile)
            head = k if k in heads else heads[0]
            text.dot("y_tile", _name("t", heads, head), "second")
            if work.norm is not None:
                text("y_tile = y_tile / seen[:, None]")
            text.store(shares[k], (block, outer), "y_tile")
    if work.norm is not None or work.guarded:
        with text.block("if rank_slice == 0"):
            if work.norm is not None:
                text.store(norms, (block,), "squares")
                used.append(norms)
            for number, name in enumerate(check.sums_of_x):
                text.store(_checks(work, group, cut, number), (block,), name)
    text.note(
        "Each wave of threads counts, once it has written: a barrier waits for no stores on AMD."
    )
    text("tl.debug_barrier()")
    counter = f"piece + {first_counter}" if first_counter else "piece"
    text(f"counter = arrived + tl.program_id(0) * {counters} + {counter}")
    text(f"thread = tl.arange(0, WAVE * {tiles.warps})")
    text("first_of_wave = thread % WAVE == 0")
    text.call(
        "before = tl.atomic_add",
        ["counter + thread * 0", "1", "mask=first_of_wave", 'sem="acq_rel"', 'scope="gpu"'],
    )
    text("before = tl.max(tl.where(first_of_wave, before, 0), 0)")
    with text.block(f"if before == {cut.shares * tiles.warps - 1}"):
        text("tl.debug_barrier()")
        if work.norm is not None:
            text.zeros("squares", tiles.rows)
            with _some_at_once(text, "inner_slice", cut.inner_slices) as slices:
                text.load("parts", norms, (slices, block), ['cache_modifier=".cg"'])
                text("squares += tl.sum(parts, 0)")
            text(f"scale = {scale_of(work)}")
        for number, name in enumerate(check.sums_of_x):
            text.zeros(name, tiles.rows)
            with _some_at_once(text, "inner_slice", cut.inner_slices) as slices:
                kept = _checks(work, group, cut, number)
                text.load("parts", kept, (slices, block), ['cache_modifier=".cg"'])
                text(f"{name} += tl.sum(parts, 0)")
        if work.norm is not None:
            check.scale("scale")
        for k in group:
            check.begin(k)
        with inner_loop(text, cut.outer, "low_output", last, cut.outer_tile, cut.outer_size):
            for k in group:
                text.zeros(_result(group, k), tiles.rows, cut.outer_tile)
            with _some_at_once(text, "share", cut.shares) as some:
                for k in group:
                    # What other programs wrote is not in this one's first cache.
                    more = ['cache_modifier=".cg"']
                    text.load("found", shares[k], (some, block, outer), more)
                    text(f"{_result(group, k)} += tl.sum(found, 0)")
            if work.norm is not None:
                for k in group:
                    text(f"{_result(group, k)} *= scale[:, None]")
            for k in group:
                check.see(k, _result(group, k), outer)
            used += epilogue(text, work, known, group, end, block, outer)
            y = known[f"y{end}"]
            text.store(y, (block, outer), f"y_tile.to({y.name}.dtype.element_ty)")
            used.append(y)
        for k in group:
            check.count(k)
        text("tl.store(counter, 0)")
    if work.norm is not None:
        used.append(known["gain"])
    if work.guarded:
        used += [*check.operands, _checks(work, group, cut, 0)]
    return Body(tuple(text.lines), (*used, *shares.values()), cut.slices * cut.shares)


def _checks(work: Work, group: Sequence[int], cut: _Cut, number: int) -> Operand:
    """Where a program leaves one of its check's sums over x, for the last one to arrive."""
    before = ((f"{number * cut.inner_slices}", "rows"),) if number else ()
    every = f"{(len(group) + 1) * cut.inner_slices} * rows"
    strides = (("piece", every), *before, ("inner_slice", "rows"), ("b", 1))
    return Operand(f"checks{suffix(work, group[0])}", strides, "float32")


@contextlib.contextmanager
def _some_at_once(text: Lines, axis: str, count: int) -> Iterator[Dimension]:
    """What is loaded along an axis, so many at once that no load waits for the one before it."""
    at_once = min(AT_ONCE, power(count))
    few = count <= at_once
    with (
        contextlib.nullcontext()
        if few
        else text.block(f"for begin in range(0, {count}, {at_once})")
    ):
        text.vector(f"next_{axis}", "" if few else "begin", at_once)
        yield (Axis(axis, f"next_{axis}", count if count % at_once else None),)


def _rank(work: Work, cut: _Cut, k: int) -> tuple[Axis, ...]:
    rank = work.specs[k].ranks[0]
    whole = rank == cut.rank_slices * cut.rank_tile
    role = roles(work.specs[k], work.contract)
    return (Axis(role.link, "r", None if whole else rank),)


def _name(name: str, group: Sequence[int], k: int) -> str:
    return f"{name}_{'gu'[group.index(k)]}" if len(group) > 1 else name


def _result(group: Sequence[int], k: int) -> str:
    return ("y_tile", "up")[group.index(k)]
