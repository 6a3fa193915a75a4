"""Contractions against a factorized weight, as functions of tensors.

The callable of a contraction plan comes from a backend (``codegen``), which this layer does not
know: ``api`` registers the backends when tensorize is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.ir import LOW_RANK, TTSpec

Contraction = Callable[[Tensor, Sequence[Tensor]], Tensor]

_backend: Callable[[TTSpec, str], Contraction] | None = None


def register_backend(build: Callable[[TTSpec, str], Contraction]) -> None:
    """Say how the callable for (spec, contract) is made."""
    global _backend
    _backend = build
    _contraction.cache_clear()


@lru_cache(maxsize=4096)
def _contraction(spec: TTSpec, contract: str) -> Contraction:
    if _backend is None:
        raise RuntimeError("no contraction backend is registered: import tensorize first")
    return _backend(spec, contract)


def matmul(
    spec: TTSpec, cores: Sequence[Tensor], x: Tensor, contract: str, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias (``contract="columns"``) or x W + bias (``"rows"``), W never built for low rank.

    ``x`` is (..., N) or (..., M), the result (..., M) or (..., N).
    """
    if spec.format == LOW_RANK and not spec.batch:
        left, right = cores
        if contract == "columns":
            return F.linear(F.linear(x, right), left, bias)
        return F.linear(F.linear(x, left.t()), right.t(), bias)
    y = _contraction(spec, contract)(x, cores)
    return y if bias is None else y + bias


def lookup(
    spec: TTSpec, cores: Sequence[Tensor], rows: Tensor, padding_idx: int | None = None
) -> Tensor:
    """Rows of W by number: ``rows`` of any shape, the result (*rows.shape, N); no table is built.

    A row number is split into one digit a core (mixed radix in the row modes), each core gives the
    slice of its digit, and the slices are multiplied from left to right (Hrinchuk et al. 2020).
    """
    if spec.format == LOW_RANK:
        left, right = cores
        return F.linear(F.embedding(rows, left, padding_idx), right.t())
    remaining = rows.reshape(-1)
    digits: list[Tensor] = []
    for mode in reversed(spec.row_modes):
        digits.append(remaining % mode)
        remaining = torch.div(remaining, mode, rounding_mode="floor")
    digits.reverse()
    # result: (B, columns so far, rank); a core's slice: (B, rank, columns, next rank)
    result: Tensor | None = None
    ranks = (1, *spec.ranks, 1)
    for k, core in enumerate(cores):
        mode, columns = spec.row_modes[k], spec.column_modes[k]
        table = core.reshape(ranks[k], mode, columns, ranks[k + 1]).transpose(0, 1)
        part = F.embedding(digits[k], table.reshape(mode, -1))
        part = part.reshape(-1, ranks[k], columns * ranks[k + 1])
        if result is None:
            result = part
        else:
            result = torch.bmm(result.reshape(part.shape[0], -1, ranks[k]), part)
    assert result is not None
    width = math.prod(spec.column_modes)
    result = result.reshape(*rows.shape, width)
    if padding_idx is None:
        return result
    # As nn.Embedding: the padding row gets no gradient.
    return torch.where((rows == padding_idx).unsqueeze(-1), result.detach(), result)


def grouped_matmul(
    spec: TTSpec, cores: Sequence[Tensor], x: Tensor, offsets: Tensor, contract: str
) -> Tensor:
    """Each expert's rows of ``x`` (S, N) against its own low-rank weight; offsets: row ends (E,).

    ``grouped_mm`` wants strides of a multiple of 16 bytes, so an odd rank is padded with zeros.
    """
    left, right = cores
    missing = -left.shape[-1] % (16 // left.element_size())
    if missing:
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    if contract == "columns":
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return F.grouped_mm(F.grouped_mm(x, left, offs=offsets), right, offs=offsets)


def convolution(
    spec: TTSpec,
    cores: Sequence[Tensor],
    x: Tensor,
    shape: Sequence[int],
    call: tuple,
    bias: Tensor | None,
) -> Tensor:
    """A convolution of rank r: the kernel's own with r outputs, then one of size 1.

    ``shape`` is the dense weight's (out, in, *kernel), ``call`` its (stride, padding, dilation).
    """
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    left, right = cores
    rank, ones = right.shape[0], (1,) * (len(shape) - 2)
    inner = convolve(x, right.reshape(rank, *shape[1:]), None, *call)
    return convolve(inner, left.reshape(shape[0], rank, *ones), bias)
