"""Small integers as bytes that say little more than their entropy, and how many those will be.

Huffman's codes give every byte whole bits, so that a likely one costs a bit at least. Integers that
are mostly zero are therefore packed, several to a byte, before they are coded; wide ones are two
bytes, balanced, so that the upper one of a small integer is 0. zstd codes bytes so, and decodes
them fast; among few different ones it finds matches that cost more than they save, and then zlib is
asked for Huffman's codes alone.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import zstandard
from torch import Tensor

from tensorize.base.tensors import raw_bytes

_MIDDLE = 128

_WORTH = 0.99
"""Of what zstd makes of bytes: what another coder has to be below, as it decodes more slowly."""


@dataclass(frozen=True)
class Packing:
    """``each`` integers of a byte, all within ±``most``; of ``each`` 0 an integer has two bytes."""

    each: int
    most: int

    @property
    def base(self) -> int:
        return 2 * self.most + 1


WIDE = Packing(0, 2**15 - 1 - _MIDDLE)
PACKINGS = {packing.each: packing for packing in (Packing(4, 1), Packing(2, 7), Packing(1, 127))}
PACKINGS[WIDE.each] = WIDE

_SEGMENT, _FRAME, _TOLD = 40_000, 22, 0.57
"""Of coded bytes: about how many have one table, and its own bytes: some, and so many a symbol."""

# No matches are looked for but long ones (of what is all zero): literals are coded by Huffman's
# method, each 128 KiB with a table of its own.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, write_checksum=1
)


# ------------------------------------------------------------------------------------------ bytes


def squeezed(data: Tensor, *, packed: bool = False) -> bytes:
    """Bytes (N,), coded; a checksum is among them. ``packed``: few different ones."""
    plain = raw_bytes(data)
    found = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(plain)
    if not packed:
        return found
    coder = zlib.compressobj(wbits=zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
    other = coder.compress(plain) + coder.flush()
    return other if len(other) < _WORTH * len(found) else found


def unsqueezed(coded: memoryview, size: int) -> Tensor:
    """The ``size`` bytes that ``squeezed`` was given.

    Raises:
        ValueError: they are damaged.
    """
    try:
        if coded[:4] == zstandard.FRAME_HEADER:
            if zstandard.frame_content_size(coded) != size:
                raise ValueError(f"a part is not of {size} bytes")
            data = zstandard.ZstdDecompressor().decompress(coded)
        else:
            decoder = zlib.decompressobj()
            data = decoder.decompress(coded, size + 1)
            if not decoder.eof or decoder.unused_data:
                raise ValueError("a part does not end where its bytes do")
    except (zstandard.ZstdError, zlib.error) as error:
        raise ValueError(f"a part cannot be decoded: {error}") from error
    if len(data) != size:
        raise ValueError(f"a part is of {len(data)} bytes, and not of {size}")
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


# --------------------------------------------------------------------------------------- integers


def encoded(codes: Tensor, packing: Packing) -> list[bytes]:
    """Integers (N,), all within ±``packing.most``."""
    if packing == WIDE:
        upper = (codes + _MIDDLE) >> 8
        return [
            squeezed(part.to(torch.int8).view(torch.uint8)) for part in (upper, codes - 256 * upper)
        ]
    shifted = (codes + packing.most).to(torch.uint8)
    if packing.each > 1:
        filled = torch.nn.functional.pad(shifted, (0, -len(shifted) % packing.each))
        apart = filled.reshape(-1, packing.each)
        shifted = apart[:, 0].contiguous()
        for k in range(1, packing.each):
            shifted += apart[:, k] * packing.base**k
    return [squeezed(shifted, packed=packing.each > 1)]


def decoded(parts: Sequence[memoryview], packing: Packing, count: int) -> Tensor:
    """The ``count`` integers of ``encoded``: int8, or int16 where they are wide.

    Raises:
        ValueError: they are damaged.
    """
    if packing == WIDE:
        upper, lower = (unsqueezed(part, count).view(torch.int8).short() for part in parts)
        return upper.mul_(256).add_(lower)
    (part,) = parts
    held = unsqueezed(part, -(-count // (packing.each or 1))).numpy()
    found = np.take(_table(packing), held, mode="clip").view(np.int8)
    return torch.from_numpy(found[:count])


@cache
def _table(packing: Packing) -> np.ndarray:
    """What each byte stands for: as many integers of a byte as there are, side by side."""
    digits = np.arange(256)[:, None] // packing.base ** np.arange(packing.each)
    values = (digits % packing.base - packing.most).astype(np.int8)
    return values.view(f"u{packing.each}")[:, 0]


# ------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Histogram:
    """How often each integer is there, from ``-most`` on, and what is beyond ±``most``."""

    counts: Tensor
    beyond: int = 0

    @property
    def most(self) -> int:
        return len(self.counts) // 2

    @property
    def total(self) -> int:
        return int(self.counts.sum()) + self.beyond

    @classmethod
    def of(cls, codes: Tensor, beyond: int = 0) -> Histogram:
        """Of integers that are all within those of two bytes."""
        flat = codes.reshape(-1)
        if flat.numel() == 0:
            return cls(torch.zeros(1, dtype=torch.long), beyond)
        most = max(int(flat.max()), -int(flat.min()), 1)
        return cls(torch.bincount(flat.long() + most, minlength=2 * most + 1), beyond)

    def __add__(self, other: Histogram) -> Histogram:
        most = max(self.most, other.most)
        return Histogram(self._widened(most) + other._widened(most), self.beyond + other.beyond)

    def _widened(self, most: int) -> Tensor:
        return torch.nn.functional.pad(self.counts, (most - self.most,) * 2)

    def within(self, most: int) -> tuple[Tensor, int]:
        """The counts within ±``most``, and how many are beyond."""
        if most >= self.most:
            return self._widened(most), self.beyond
        inner = self.counts[self.most - most : self.most + most + 1]
        return inner, self.total - int(inner.sum())


def cheapest(found: Histogram, apart: float) -> tuple[Packing, float]:
    """How integers are packed best, and the bits that they then take.

    ``apart``: the bits of one that is kept beside, as it is beyond what the packing holds.
    """
    best: tuple[Packing, float] | None = None
    for packing in PACKINGS.values():
        if packing == WIDE and found.most <= PACKINGS[1].most:
            continue
        bits = _bits(found, packing, apart)
        if best is None or bits < best[1]:
            best = packing, bits
    assert best is not None
    return best


def _bits(found: Histogram, packing: Packing, apart: float) -> float:
    counts, beyond = found.within(packing.most)
    counts = counts.clone()
    counts[packing.most] += beyond  # each has a zero in its place
    beside = apart * beyond
    if packing == WIDE:
        upper = (torch.arange(-packing.most, packing.most + 1) + _MIDDLE) >> 8
        lower = torch.arange(-packing.most, packing.most + 1) - 256 * upper + _MIDDLE
        return beside + sum(
            _squeezed_bits(torch.zeros(257).double().index_add_(0, i, counts.double()))
            for i in (upper - upper.min(), lower)
        )
    shares = counts.double() / counts.sum().clamp_min(1)
    joint = shares
    for _ in range(packing.each - 1):  # as if neighbours were independent
        joint = torch.outer(joint, shares).flatten()
    return beside + _squeezed_bits(joint * -(-found.total // packing.each))


def _squeezed_bits(counts: Tensor) -> float:
    """The bits of bytes of such counts, with the tables that tell the codes."""
    total, different = float(counts.sum()), int((counts >= 0.5).sum())
    if different < 2:
        return 8 * _FRAME
    tables = math.ceil(total / _SEGMENT) * (_FRAME + _TOLD * different)
    return _huffman(counts) + 8 * tables


def _huffman(counts: Tensor) -> float:
    """The bits of symbols of such counts in Huffman's code."""
    heap = [count for count in counts.tolist() if count > 0]
    heapq.heapify(heap)
    bits = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits
