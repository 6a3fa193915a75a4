"""How many bits an entry of a weight is kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1} | {
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of an entry of the dtypes that cores and indices are kept in."""


FLOAT, ONE_DIGIT, TWO_DIGITS = "float", "int8", "int16"
INPUTS = (ONE_DIGIT, TWO_DIGITS, FLOAT)
"""What the inputs of a quantized weight are rounded to where products are ones of integers: eight
bits, twice eight, or nothing, and then there are none."""


@dataclass(frozen=True)
class Precision:
    """Integers of ``bits`` bits.

    So many columns as ``group`` (None: a whole row) share a scale; with ``offset`` a zero point,
    too, of as many bits.
    """

    name: str
    bits: int
    group: int | None
    offset: bool

    @property
    def middle(self) -> int:
        """The code that stands for zero, where there is no zero point."""
        return 0 if self.bits == 8 else 2 ** (self.bits - 1)

    @property
    def dtype(self) -> str:
        """Of the bytes that codes are packed in."""
        return "int8" if self.bits == 8 else "uint8"

    @property
    def codes(self) -> tuple[int, int]:
        """The least code and the largest; without a zero point as many are on both sides."""
        if self.bits == 8:
            return -127, 127
        return 0, 2**self.bits - 1

    def packed(self, count: Any) -> Any:
        """Bytes of so many codes: of three bits, two planes of two and of one."""
        planes = {3: (2, 1)}.get(self.bits, (self.bits,))
        return sum(-(-count * bits // 8) for bits in planes)

    def bytes(self, rows: Any, columns: Any, itemsize: int, holders: int = 1) -> Any:
        """Of a matrix with scales of so many bytes; every holder has codes of its own."""
        groups = self.groups(columns)
        codes = self.packed(columns) + (self.packed(groups) if self.offset else 0)
        return rows * (itemsize * groups + holders * codes)

    def groups(self, columns: Any) -> Any:
        """Groups of a row of so many columns."""
        return 1 if self.group is None else -(-columns // self.group)


INTEGERS = {
    each.name: each
    for each in (
        Precision("int8", 8, None, offset=False),
        Precision("int4", 4, 64, offset=True),
        Precision("int3", 3, 64, offset=True),
        Precision("int2", 2, 64, offset=True),
    )
}
