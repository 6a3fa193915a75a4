"""How kernels are cut where nothing was timed: tiles by family, rank and dtype.

They are chosen to fit: no spills, and the shared memory of the smallest target (64 KiB on AMD,
where fewer tiles are in flight). ``tests/codegen/device/test_compiler.py`` holds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tensorize.codegen.triton import chain, decode
from tensorize.codegen.triton.roles import CHUNK, Tiles, chunks, held_at_once, is_pair
from tensorize.codegen.triton.text import DOT, power
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work

FEW_ROWS = 16
"""Up to here a decode kernel is considered: one tile of a dot's least side."""
PROCESSORS = 132
"""Of a large GPU, which a decode kernel is cut for."""
_WAIT = 16_000
"""Bytes that a processor could read while it waits for what others wrote, about half a µs."""

# Padded rank → rows, inner, outer, warps, stages; two bytes an entry, and four.
_HALF = {
    128: (128, 64, 64, 8, 3),
    256: (64, 64, 64, 8, 3),
    384: (32, 32, 32, 8, 3),
    512: (64, 32, 32, 8, 3),
}
_SINGLE = {
    64: (32, 32, 32, 4, 3),
    128: (32, 32, 32, 8, 3),
    256: (16, 32, 32, 8, 3),
    512: (16, 16, 16, 8, 3),
}


def default(work: Work, dtype: torch.dtype, rows: int | None = None) -> Tiles:
    """For ``triton_source.forward``; ``rows``: how many x has, at most (None: very many).

    Where row blocks alone leave processors idle, each is cut into slices of the outputs, all of
    which compute the intermediate anew.
    """
    tiles = limited(work, _fitting(work, dtype))
    if rows is None or not all(map(is_pair, work.specs)):
        return tiles
    if rows <= 512:
        # More than one dot's width of rank leaves AMD no registers for more.
        wide = sum(spec.ranks[0] for spec in work.specs) > CHUNK
        tiles = replace(tiles, rows=min(tiles.rows, 16 if wide else 32))
    slices = max(1, PROCESSORS // -(-rows // tiles.rows))
    return replace(tiles, slice=-(-max(work.outs) // slices)) if slices > 1 else tiles


_GATHERED = 4096
"""Entries of x that are read by number at a time, each by an address of 64 bits of its own."""


def limited(work: Work, tiles: Tiles) -> Tiles:
    """Tiles that leave registers for what a work holds beside its products: the sums of a check,
    two of every row and weight, and addresses of columns that are read by number."""
    deep, most = len(work.specs[0].cores) > 2, tiles.rows
    if work.guarded and (deep or work.shared):
        most = 16 if deep else 64
    room = _GATHERED // 2 if work.guarded or work.norm is not None else _GATHERED
    for spec in work.specs:
        if spec.pivoted:
            widest = max(width for _, width in chunks(spec.ranks[0]))
            most = min(most, max(DOT, room // widest))
    return replace(tiles, rows=min(tiles.rows, most))


def _fitting(work: Work, dtype: torch.dtype) -> Tiles:
    """Tiles that fit on every target."""
    spec = work.specs[0]
    if len(spec.cores) > 2:
        rows = chain.block_rows(spec, work.contract, 32)
        return Tiles(rows=rows, inner=32, warps=8, stages=2)
    held = sum(width for spec in held_at_once(work) for _, width in chunks(spec.ranks[0]))
    single = dtype == torch.float32
    table = _SINGLE if single else _HALF
    fitting = (cut for rank, cut in table.items() if held <= rank)
    rows, inner, outer, warps, stages = next(fitting, table[512])
    if not is_pair(spec):
        # Four bytes an entry at more than 16 rows leave no registers for unaligned addresses.
        most, warps = (16, 8) if single else (64, 4)
        inner = 16 if single and work.guarded else 32
        return Tiles(min(rows, most), inner, 64, warps=warps, stages=2)
    if any(size % 8 for spec in work.specs for _, size in spec.sizes):
        inner, outer = 16, min(outer, 32)  # entries are read one by one, each by its own address
    if work.norm is not None and work.norm.kind == "layer":
        rows, inner, warps = min(rows, 32), 32, 8  # two sums over the first core ride along
    if single and any(spec.pivoted for spec in work.specs):
        inner = 16  # with more, ptxas keeps to 64 registers, and spills some bytes
    return Tiles(rows=rows, inner=inner, outer=outer, warps=warps, stages=stages)


def default_decode(work: Work, dtype: torch.dtype, rows: int = FEW_ROWS) -> Tiles:
    """For ``triton_source.decode``: the cut that moves the fewest bytes through one processor.

    Every program reads its slices of both factors, most of them from the second-level cache, and
    the last ones to arrive read the shares of all others, and wait for them: many slices of the
    summed side make the first cheap and the second dear, the more so the more rows there are.
    """
    rank = max(spec.ranks[0] for spec in work.specs)
    outputs, item = max(work.outs), dtype.itemsize
    inner = 64 if item == 4 else 128
    weights = len(work.specs)
    launched, held = (1, weights) if work.gated else (weights, 1)

    def moved(cut: tuple[int, int, int]) -> tuple[float, int]:
        rank_tile, inner_slices, output_slices = cut
        shares = -(-rank // rank_tile) * inner_slices
        programs = launched * shares * output_slices
        slice_of_outputs = outputs / output_slices
        factors = rank_tile * (work.into / inner_slices + slice_of_outputs) * item
        waits = -(-shares // decode.AT_ONCE) * -(-slice_of_outputs // 64)
        added = rows * shares * slice_of_outputs * 4 + _WAIT * waits
        every = -(-programs // PROCESSORS) * (factors + rows * slice_of_outputs * 4)
        return held * (every + -(-launched * output_slices // PROCESSORS) * added), programs

    rank_tiles = [
        tile for tile in (8 * item, 32, 64, 128) if tile <= max(power(rank, DOT), 8 * item)
    ]
    cuts = (
        (rank_tile, inner_slices, output_slices)
        for rank_tile in rank_tiles
        for inner_slices in range(1, max(1, min(16, work.into // inner)) + 1)
        for output_slices in range(1, max(1, min(PROCESSORS, outputs // 64)) + 1)
    )
    rank_tile, inner_slices, output_slices = min(cuts, key=moved)
    return Tiles(
        rows=FEW_ROWS,
        inner=inner,
        outer=32 if work.guarded and item == 4 else 64,  # with more, ptxas spills some bytes
        slice=-(-outputs // output_slices),
        rank=rank_tile,
        inner_slice=-(-work.into // inner_slices),
        warps=4,
        stages=3,
    )


def default_lookup(spec: TTSpec, dtype: torch.dtype) -> Tiles:
    """For ``triton_source.lookup``."""
    tiles = default(Work((spec.single,), "rows"), dtype)
    if len(spec.cores) > 2 or not is_pair(spec):
        return Tiles(rows=1, warps=4, stages=1)
    return replace(tiles, rows=min(tiles.rows, 32), slice=1024)


def default_gradients(spec: TTSpec, dtype: torch.dtype) -> Tiles:
    """For ``triton_source.gradients``."""
    side, warps = (32, 4) if dtype == torch.float32 else (64, 4)
    return Tiles(rows=32, inner=32, outer=side, warps=warps, stages=3)
