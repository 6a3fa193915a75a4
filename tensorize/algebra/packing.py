"""Codes of a few bits in bytes, and the numbers that they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.ir.precision import Precision


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (…, N) of so many bits, as bytes (…, ``Precision.packed(N)``).

    The first code is the lowest of a byte. Codes of three bits are two planes: the lower two bits,
    then the third.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([packed(codes & 3, 2), packed(codes >> 2, 1)], dim=-1)
    each = 8 // bits
    filled = F.pad(codes, (0, -codes.shape[-1] % each))
    apart = filled.unflatten(-1, (-1, each)).to(torch.int32)
    return (apart << _shifts(bits, codes)).sum(-1).to(torch.uint8)


def unpacked(held: Tensor, bits: int, count: int) -> Tensor:
    """The codes (…, N) of ``packed``."""
    if bits == 8:
        return held
    if bits == 3:
        low = -(-count * 2 // 8)
        return unpacked(held[..., :low], 2, count) | (unpacked(held[..., low:], 1, count) << 2)
    apart = (held.unsqueeze(-1) >> _shifts(bits, held).to(torch.uint8)) & (2**bits - 1)
    return apart.flatten(-2)[..., :count]


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32, device=like.device)


def values(
    kind: Precision, columns: int, scale: Tensor, codes: Tensor, zeros: Tensor | None
) -> Tensor:
    """The numbers (…, N) of packed codes, in the dtype of their scales (…, groups)."""
    groups = kind.groups(columns)
    size = kind.group or columns
    found = unpacked(codes, kind.bits, columns).to(scale.dtype)
    if zeros is None:
        return (found - kind.middle) * scale
    zero = unpacked(zeros, kind.bits, groups).to(scale.dtype)
    padded = F.pad(found, (0, groups * size - columns)).unflatten(-1, (groups, size))
    apart = (padded - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return apart.flatten(-2)[..., :columns]
