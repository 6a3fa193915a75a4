"""Codes of several matrices as bytes: those that are likely to be as large are coded together.

How large codes are hangs on the step of their column, which the decoder knows, and on their row,
of which that is said. With rows and columns in the order of that, the codes that are about as
large are a few rectangles, and those of all matrices of a group are one stream, which has a table
of Huffman's of its own. Small matrices share a group, and with it the tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from tensorize.algebra.water import Steps, powers
from tensorize.coding import steps as stepped
from tensorize.coding.symbols import PACKINGS, Histogram, cheapest
from tensorize.coding.tensors import ENTRIES, Block, in_threads

_STREAMS = 24
"""How many sizes of codes are told apart: by half octaves."""

_SMALLEST = -8
"""Half octaves: the size of codes in the first stream."""

_NOTHING = -120
"""The level of a row that is all zero."""

_APART = 40
"""Bits of a code that is kept beside its stream, about."""


@dataclass(frozen=True)
class Coded:
    """A matrix's codes (M, N), their steps, and the level (M,) of every row.

    That is the size of its codes in half octaves, where a column's step is one.
    """

    steps: Steps
    codes: Tensor
    levels: Tensor

    @property
    def numbers(self) -> Tensor:
        """What the codes stand for, in float32."""
        return self.steps.numbers(self.codes)

    @classmethod
    def of(cls, steps: Steps, codes: Tensor) -> Coded:
        squares = (codes.float() * powers(steps.across)).square_().mean(1)
        levels = squares.clamp_min(1e-30).log2().round().masked_fill(squares == 0, _NOTHING)
        return cls(steps, codes, levels.clamp(_NOTHING, -_NOTHING).to(torch.int16))


@dataclass(frozen=True)
class Group:
    """How matrices of some ``shapes`` lie in coded bytes: first the exponents of the steps of their
    rows, of their columns, and the levels of their rows, then the streams."""

    shapes: tuple[tuple[int, int], ...]
    sides: tuple[Block, Block, Block]
    streams: tuple[tuple[int, Block], ...]

    @property
    def bytes(self) -> int:
        blocks = (*self.sides, *(block for _, block in self.streams))
        return sum(sum(block.parts) for block in blocks)


def _tiles(levels: Tensor, across: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """The stream of every rectangle of rows and columns, which are in order."""
    columns = _runs(across)
    for level, row in _runs(levels):
        for other, column in columns:
            yield min(max(level - other - _SMALLEST, 0), _STREAMS - 1), row, column


def _runs(levels: Tensor) -> list[tuple[int, slice]]:
    found, counts = levels.unique_consecutive(return_counts=True)
    ends = list(accumulate(counts.tolist(), initial=0))
    return [(x, slice(a, b)) for x, (a, b) in zip(found.tolist(), pairwise(ends), strict=True)]


def _halves(exponents: Tensor) -> Tensor:
    """Quarter octaves as half ones."""
    return exponents.div(2, rounding_mode="floor")


# ------------------------------------------------------------------------------------------ sizes


def sizes_of(given: Sequence[Coded]) -> float:
    """The bytes that matrices are expected to take in a group."""
    streams = [torch.cat(codes) for codes in _gathered(given).values()]
    return sum(cheapest(Histogram.of(codes), _APART)[1] / 8 for codes in (*streams, *_sides(given)))


# --------------------------------------------------------------------------------------- encoding


def encode(given: Sequence[Coded]) -> tuple[Group, bytes]:
    """The bytes of matrices."""
    sides = [_block(side) for side in _sides(given)]
    jobs = [
        (stream, part)
        for stream, codes in sorted(_gathered(given).items())
        for part in torch.cat(codes).split(ENTRIES)
    ]
    done = list(in_threads(lambda job: _block(job[1]), jobs))
    streams = tuple((stream, block) for (stream, _), (block, _) in zip(jobs, done, strict=True))
    down, across, levels = (block for block, _ in sides)
    shapes = tuple((len(each.steps.down), len(each.steps.across)) for each in given)
    data = b"".join(part for _, parts in (*sides, *done) for part in parts)
    return Group(shapes, (down, across, levels), streams), data


def _gathered(given: Sequence[Coded]) -> dict[int, list[Tensor]]:
    """The codes of every stream."""
    streams: dict[int, list[Tensor]] = defaultdict(list)
    for each in given:
        levels, rows = each.levels.sort(stable=True)
        across, columns = _halves(each.steps.across).sort(stable=True)
        ordered = each.codes.to(torch.int16)[rows][:, columns]
        for stream, row, column in _tiles(levels, across):
            streams[stream].append(ordered[row, column].reshape(-1))
    return streams


def _sides(given: Sequence[Coded]) -> tuple[Tensor, Tensor, Tensor]:
    sides = [(each.steps.down, each.steps.across, each.levels) for each in given]
    down, across, levels = (torch.cat(parts) for parts in zip(*sides, strict=True))
    return down, across, levels


def _block(codes: Tensor) -> tuple[Block, list[bytes]]:
    packing, _ = cheapest(Histogram.of(codes), _APART)
    beside = codes.abs() > packing.most
    parts = stepped.encoded(stepped.Stepped(codes.int(), beside, 1.0), codes, packing)
    sizes = tuple(map(len, parts))
    return Block(len(codes), packing.each, 1.0, int(beside.sum()), sizes), parts


# --------------------------------------------------------------------------------------- decoding


def decode(group: Group, data: memoryview) -> list[Tensor]:
    """The numbers of every matrix, in float32.

    Raises:
        ValueError: the bytes are damaged, or not those of this group.
    """
    if len(data) != group.bytes:
        raise ValueError(f"{len(data)} bytes are no group of {group.bytes}")
    blocks = [*group.sides, *(block for _, block in group.streams)]
    if any(min(block.parts, default=0) < 0 or block.entries < 0 for block in blocks):
        raise ValueError("a block has less than no bytes")
    offsets = accumulate((sum(block.parts) for block in blocks), initial=0)
    jobs = list(zip(blocks, offsets, strict=False))
    decoded = list(in_threads(lambda job: _decode_block(*job, data), jobs))
    streams: dict[int, list[Tensor]] = defaultdict(list)
    for (stream, _), codes in zip(group.streams, decoded[3:], strict=True):
        streams[stream].append(codes)
    wide = any(part.dtype == torch.int16 for codes in streams.values() for part in codes)
    dtype = torch.int16 if wide else torch.int8
    readers = {stream: _Reader(torch.cat(codes)) for stream, codes in streams.items()}
    down, across, levels = sides = [_Reader(codes) for codes in decoded[:3]]
    result = []
    for rows, columns in group.shapes:
        steps = Steps(down.take(rows), across.take(columns))
        result.append(steps.numbers(_scattered(steps, levels.take(rows), readers, dtype)))
    if any(reader.left for reader in (*sides, *readers.values())):
        raise ValueError("a stream is longer than what it is of")
    return result


def _scattered(
    steps: Steps, levels: Tensor, readers: Mapping[int, _Reader], dtype: torch.dtype
) -> Tensor:
    """The codes of a matrix, out of the streams."""
    levels, rows = levels.sort(stable=True)
    across, columns = _halves(steps.across).sort(stable=True)
    ordered = torch.empty(len(rows), len(columns), dtype=dtype)
    for stream, row, column in _tiles(levels, across):
        if stream not in readers:
            raise ValueError(f"there is no stream {stream}")
        tile = ordered[row, column]
        tile.copy_(readers[stream].take(tile.numel()).reshape(tile.shape))
    # By columns numpy takes a quarter of torch's time.
    placed = np.take(ordered.numpy(), columns.argsort().numpy(), axis=1)
    return torch.from_numpy(placed).index_select(0, rows.argsort())


class _Reader:
    """Entries in a row, taken one after the other."""

    def __init__(self, entries: Tensor) -> None:
        self._entries, self._at, self.left = entries, 0, len(entries)

    def take(self, count: int) -> Tensor:
        if not 0 <= count <= self.left:
            raise ValueError("a stream ends before what it is of")
        self._at += count
        self.left -= count
        return self._entries[self._at - count : self._at]


def _decode_block(block: Block, offset: int, data: memoryview) -> Tensor:
    if block.packing not in PACKINGS:
        raise ValueError(f"no packing is {block.packing}")
    ends = list(accumulate(block.parts, initial=offset))
    parts = [data[a:b] for a, b in pairwise(ends)]
    kept = torch.int16
    codes, places, beside = stepped.decoded(parts, block.packing, block.entries, block.beside, kept)
    if block.beside:
        codes = codes.short()
        codes[places] = beside
    return codes
