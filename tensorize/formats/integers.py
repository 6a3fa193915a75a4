"""Products of integers: inputs rounded to one digit of eight bits or two, codes of eight bits.

Microseconds on one thread of Zen 5, for a weight of 768 x 768, at 1, 16 and 256 rows:

| | float32 | bfloat16 |
|---|---|---|
| ``F.linear`` with the numbers | 42, 301, 3630 | 41, 73, 604 |
| inputs of one digit | 27, 76, 630 | 23, 57, 460 |
| of two digits | 56, 119, 1091 | 46, 91, 848 |
| four bits made numbers at every call, then ``F.linear`` | 759, 1087, 7740 | 671, 708, 2213 |
| a product a group of 64 columns, codes of four bits in bytes | 147, 232, 1273 | 141, 161, 1600 |
| torch's own of four bits (``_weight_int4pack_mm_for_cpu``) | 934, 17800, 238069 | 16, 107, 1794 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorize.ir.machine import Machine, lookup_time
from tensorize.ir.precision import TWO_DIGITS

_LARGEST = 127
_SEEN = 3
"""How often an input is read and written to make integers of it."""

_DIGIT = 2 * _LARGEST
"""What a step of the first digit is of the second: it is off by half a step at most."""


@dataclass(frozen=True)
class Pack:
    """A matrix (M, N) for products of integers: codes of eight bits, a scale for every row."""

    scale: Tensor
    codes: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Pack:
        """The nearest to a matrix."""
        wide = matrix.float()
        scale = _steps(wide)
        return cls(scale, (wide / scale).round_().to(torch.int8))

    @property
    def bytes(self) -> int:
        return self.scale.nbytes + self.codes.nbytes

    def linear(self, x: Tensor, inputs: str) -> Tensor:
        """x (B, N) times the matrix transposed; every row of x has a scale of its own."""
        wide = x.float()  # in half precision the largest would be rounded to a code too many
        steps = _steps(wide)
        wide = wide / steps
        if inputs != TWO_DIGITS:
            product = _product(wide.round_().to(torch.int8), self.codes).float()
        else:
            first = wide.round()
            second = wide.sub_(first).mul_(_DIGIT).round_()
            digits = torch.cat([first.to(torch.int8), second.to(torch.int8)])
            product, rest = _product(digits, self.codes).float().chunk(2)
            product = product + rest / _DIGIT
        return (product * steps * self.scale.float().mT).to(x.dtype)


def product_time(
    machine: Machine, rows: int, width: Any, dtype: str, inputs: str, products: Any
) -> Any:
    """Microseconds of products with inputs of so many entries; ``products(rows)``: their own."""
    digits = 2 if inputs == TWO_DIGITS else 1
    return digits * _SEEN * lookup_time(machine, rows, width, dtype) + products(digits * rows)


def _steps(wide: Tensor) -> Tensor:
    """The step of the codes of every row."""
    largest = wide.abs().amax(-1, keepdim=True)
    return largest.clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST


def _product(x: Tensor, codes: Tensor) -> Tensor:
    if codes.shape[1] == 1:  # of which torch 2.13 makes wrong numbers
        return x.int() * codes.t()
    return torch._int_mm(x, codes.t())  # pyright: ignore[reportPrivateImportUsage]
