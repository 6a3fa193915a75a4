"""A tensor as coded bytes, in blocks that are coded and decoded by themselves.

A block's codes stand for multiples of a step, or it holds its entries as they are: whatever takes
fewer bytes, and is within the bound that the tensor has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from tensorize.coding import peers, planes, steps
from tensorize.coding.symbols import PACKINGS

ENTRIES = 1 << 20
"""Of a block, at most."""

_PLANES = -1
"""The packing of a block that holds its entries as they are."""

_PEERS = {-2: "sz3", -3: "zfp"}
"""The packing of a block that holds a whole tensor as another coder does."""

_FEW = 0.01
"""The share of entries kept beside up to which no smaller step is tried."""

_WORTH = 0.9
"""Of the bits of its entries: where codes take more, the entries may take less as they are."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Block:
    """Entries in a row: how they are packed, the step, how many are kept beside, bytes of parts."""

    entries: int
    packing: int
    step: float
    beside: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Coding:
    """How a tensor lies in coded bytes.

    ``bound`` is the largest error that an entry may have, and ``found`` what one has; both are 0
    where every bit is kept.
    """

    dtype: str
    shape: tuple[int, ...]
    bound: float
    found: float
    blocks: tuple[Block, ...]

    @property
    def bytes(self) -> int:
        return sum(sum(block.parts) for block in self.blocks)


# --------------------------------------------------------------------------------------- encoding


def encode(tensor: Tensor, bound: float = 0.0) -> tuple[Coding, bytes]:
    """A tensor's bytes, with no entry further than ``bound`` from what it was; 0: all bits kept."""
    flat = _flat(tensor)
    own = bound / math.sqrt(2) if tensor.is_complex() else bound
    usable = own if flat.is_floating_point() and flat.element_size() > 1 else 0.0
    blocks = flat.split(ENTRIES) if flat.numel() else ()
    done = list(in_threads(partial(_block, bound=usable), blocks))
    found = max((lost for *_, lost in done), default=0.0)
    if tensor.is_complex():
        found *= math.sqrt(2)
    return _coding(tensor, [block for block, *_ in done], bound, found), _joined(done)


def encode_by(name: str, tensor: Tensor, bound: float) -> tuple[Coding, bytes]:
    """The same by another coder, of ``peers.PEERS``, where that can hold the tensor.

    Raises:
        CheckpointError: the coder is not installed.
    """
    own = bound / math.sqrt(2) if tensor.is_complex() else bound
    made = peers.encoded(peers.PEERS[name], _reals(tensor), own)
    if made is None:
        return encode(tensor, bound)
    data, found = made
    (packing,) = (each for each, known in _PEERS.items() if known == name)
    count = _flat(tensor).numel()
    block = Block(count, packing, 0.0, 0, (len(data),))
    return _coding(tensor, [block], bound, found * (own and bound / own)), data


def coder_of(coding: Coding) -> str | None:
    """The other coder that holds a tensor; None: it is ours."""
    return next((_PEERS[b.packing] for b in coding.blocks if b.packing in _PEERS), None)


def _block(entries: Tensor, *, bound: float) -> tuple[Block, list[bytes], float]:
    """A block that takes few bytes, and its largest error."""
    held = 8 * entries.numel() * entries.element_size()
    best = None
    # Entries of few digits may lie further apart than the bound: half the step then meets them.
    for step in (2 * bound, bound) if _usable(bound) else ():
        found = steps.stepped(entries, bound, step)
        packing, bits = steps.size_of(steps.histogram(found), entries.element_size())
        if best is None or bits < best[0]:
            best = bits, found, packing
        if bool(found.beside.float().mean() < _FEW):
            break
    if best is None:
        return _exact(entries)
    _, found, packing = best
    coded = steps.encoded(found, entries, packing)
    if sum(map(len, coded)) * 8 > _WORTH * held:
        exact = _exact(entries)
        if sum(exact[0].parts) <= sum(map(len, coded)):
            return exact
    beside = found.beside | (found.codes.abs() > packing.most)
    made = steps.numbers(found.codes, found.step, entries.dtype).double()
    lost = (made - entries.double()).abs_().masked_fill_(beside, 0)
    sizes = tuple(map(len, coded))
    block = Block(entries.numel(), packing.each, found.step, int(beside.sum()), sizes)
    return block, coded, float(lost.max())


def _exact(entries: Tensor) -> tuple[Block, list[bytes], float]:
    parts = planes.encoded(entries)
    return Block(entries.numel(), _PLANES, 0.0, 0, tuple(map(len, parts))), parts, 0.0


def range_of(tensor: Tensor) -> float:
    """From the least finite entry to the largest; of complex ones, of their parts."""
    flat = _flat(tensor)
    finite = flat[flat.isfinite()].double()
    return float(finite.max() - finite.min()) if finite.numel() else 0.0


def _usable(bound: float) -> bool:
    return bound > 0 and math.isfinite(2 * bound)


def _coding(tensor: Tensor, blocks: Sequence[Block], bound: float, found: float) -> Coding:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Coding(dtype, tuple(tensor.shape), bound, found, tuple(blocks))


def _joined(done: Iterable[Sequence[Any]]) -> bytes:
    return b"".join(part for _, parts, *_ in done for part in parts)


def _flat(tensor: Tensor) -> Tensor:
    """The entries in a row: complex ones as two each."""
    return _reals(tensor).contiguous().reshape(-1)


def _reals(tensor: Tensor) -> Tensor:
    """Complex entries as a last dimension of two."""
    plain = tensor.detach().cpu()
    return torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain


# --------------------------------------------------------------------------------------- decoding


def decode(coding: Coding, data: memoryview) -> Tensor:
    """The tensor of ``encode`` or ``encode_scaled``.

    Raises:
        ValueError: the bytes are damaged, or not those of this coding.
    """
    dtype = getattr(torch, coding.dtype, None)
    if not isinstance(dtype, torch.dtype) or len(data) != coding.bytes:
        raise ValueError(f"{len(data)} bytes are no {coding.dtype} of {coding.shape}")
    real = dtype.to_real() if dtype.is_complex else dtype
    count = math.prod(coding.shape) * (2 if dtype.is_complex else 1)
    if sum(block.entries for block in coding.blocks) != count:
        raise ValueError(f"blocks are not of the entries of {coding.shape}")
    if any(min(block.parts, default=0) < 0 or block.entries < 0 for block in coding.blocks):
        raise ValueError("a block has less than no bytes")
    if (name := coder_of(coding)) is not None:
        if len(coding.blocks) > 1:
            raise ValueError(f"of {name} there is more than one block")
        shape = (*coding.shape, 2) if dtype.is_complex else coding.shape
        found = peers.decoded(peers.PEERS[name], data, shape, real)
        return torch.view_as_complex(found) if dtype.is_complex else found
    result = torch.empty(count, dtype=real)
    offsets = accumulate((sum(b.parts) for b in coding.blocks), initial=0)
    starts = accumulate((block.entries for block in coding.blocks), initial=0)
    jobs = list(zip(coding.blocks, offsets, starts, strict=False))
    for _ in in_threads(lambda job: _decode_block(*job, data, result), jobs):
        pass
    if dtype.is_complex:
        return torch.view_as_complex(result.reshape(*coding.shape, 2))
    return result.reshape(coding.shape)


def _decode_block(
    block: Block,
    offset: int,
    start: int,
    data: memoryview,
    result: Tensor,
) -> None:
    ends = list(accumulate(block.parts, initial=offset))
    parts = [data[a:b] for a, b in pairwise(ends)]
    place, dtype = result[start : start + block.entries], result.dtype
    if block.packing == _PLANES:
        if len(parts) != dtype.itemsize:
            raise ValueError(f"{len(parts)} planes are no {dtype}")
        place.copy_(planes.decoded(parts, dtype, block.entries))
        return
    if block.packing not in PACKINGS:
        raise ValueError(f"no packing is {block.packing}")
    codes, places, beside = steps.decoded(parts, block.packing, block.entries, block.beside, dtype)
    place.copy_(steps.numbers(codes, block.step, dtype))
    place[places] = beside


def in_threads(work: Callable[[_T], _R], each: Sequence[_T]) -> Iterator[_R]:
    """``work`` of each, in order, by as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1 or len(each) < 2:
        yield from map(work, each)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, each)
