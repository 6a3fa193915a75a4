"""Products of integers: inputs rounded to one digit of eight bits or two, codes of eight bits.

Microseconds on one thread of Zen 5, for a weight of 768 x 768, at 1, 16 and 256 rows:

| | float32 | bfloat16 |
|---|---|---|
| ``F.linear`` with the numbers | 42, 301, 3630 | 41, 73, 604 |
| inputs of one digit (30 in a layer) | 20, 76, 630 | 23, 57, 460 |
| of two digits | 56, 119, 1091 | 46, 91, 848 |
| four bits made numbers at every call, then ``F.linear`` | 759, 1087, 7740 | 671, 708, 2213 |
| a product a group of 64 columns, codes of four bits in bytes | 147, 232, 1273 | 141, 161, 1600 |
| torch's own of four bits (``_weight_int4pack_mm_for_cpu``) | 934, 17800, 238069 | 16, 107, 1794 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorize.ir.machine import Machine, bytes_of
from tensorize.ir.precision import TWO_DIGITS

_LARGEST = 127
_SEEN = 3
"""How often an input is read and written to make integers of it."""

_CALLS = 2e-5
"""Seconds that the calls take which make integers of an input, and numbers of a product, whatever
the rows; those of a second digit take half as much again beside as many."""
_SECOND = 1.5

_DIGIT = 2 * _LARGEST
"""What a step of the first digit is of the second: it is off by half a step at most."""


@dataclass(frozen=True)
class Pack:
    """A matrix (M, N) for products of integers, from the right: codes of eight bits, transposed
    (N, M), and a scale for every row (1, M), in float32."""

    scale: Tensor
    codes: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Pack:
        """The nearest to a matrix."""
        wide = matrix.float()
        scale = _steps(wide)
        return cls.held(scale, (wide / scale).round_().to(torch.int8))

    @classmethod
    def held(cls, scale: Tensor, codes: Tensor) -> Pack:
        """Of scales (M, 1) and codes (M, N), which are kept as they are."""
        return cls(scale.float().mT, codes.t())

    @property
    def bytes(self) -> int:
        return self.scale.nbytes + self.codes.nbytes

    def linear(self, x: Tensor, inputs: str) -> Tensor:
        """x (B, N) times the matrix transposed; every row of x has a scale of its own."""
        wide = x.float()  # in half precision the largest would be rounded to a code too many
        steps = _steps(wide)
        wide = wide / steps
        if digits_of(inputs) == 1:
            product = _product(wide.round_().to(torch.int8), self.codes)
        else:
            first = wide.round()
            second = wide.sub_(first).mul_(_DIGIT).round_()
            digits = torch.cat([first.to(torch.int8), second.to(torch.int8)])
            product, rest = _product(digits, self.codes).chunk(2)
            product = product + rest / _DIGIT
        return (product * steps).mul_(self.scale).to(x.dtype)


def rounding_time(
    machine: Machine, rows: int, widths: Sequence[Any], dtype: str, digits: int
) -> Any:
    """Microseconds that are lost around products of integers, with inputs of so many entries."""
    moved = 2 * bytes_of(dtype) * rows * sum(widths) / machine.bandwidth
    calls = _CALLS * (1 + _SECOND * (digits - 1)) * len(widths)
    return 1e6 * (digits * _SEEN * moved + calls)


def digits_of(inputs: str) -> int:
    """How many digits of eight bits inputs are rounded to."""
    return 2 if inputs == TWO_DIGITS else 1


def _steps(wide: Tensor) -> Tensor:
    """The step of the codes of every row."""
    largest = wide.abs().amax(-1, keepdim=True)
    return largest.clamp_min_(torch.finfo(torch.float32).tiny).div_(_LARGEST)


def _product(x: Tensor, codes: Tensor) -> Tensor:
    if len(codes) == 1:  # of which torch 2.13 makes wrong numbers
        return x.int() * codes
    return torch._int_mm(x, codes)  # pyright: ignore[reportPrivateImportUsage]
