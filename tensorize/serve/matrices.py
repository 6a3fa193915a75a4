"""A weight of a checkpoint as an engine multiplies with it: one matrix, or two after each other.

Shapes: M rows and N columns of the weight, R its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.formats.dense import is_dense
from tensorize.formats.quantized import Quantized
from tensorize.formats.registry import format_of
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.spec import Spec


@dataclass(frozen=True)
class Matrix:
    """Numbers (M, N), or codes of eight bits with a scale (M, 1) for every row."""

    entries: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.entries.shape

    @property
    def coded(self) -> bool:
        return self.scale is not None

    def at_rows(self, parts: Sequence[slice]) -> Matrix:
        """Some of the rows, one part below the other."""
        entries = torch.cat([self.entries[part] for part in parts])
        if self.scale is None:
            return Matrix(entries)
        return Matrix(entries, torch.cat([self.scale[part] for part in parts]))

    def at_columns(self, part: slice) -> Matrix:
        """Some of the columns: a row keeps its scale."""
        return Matrix(self.entries[:, part].contiguous(), self.scale)


def below(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one kind as one, each below the one before."""
    scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
    entries = torch.cat([matrix.entries for matrix in matrices])
    return Matrix(entries, torch.cat(scales) if scales else None)


@dataclass(frozen=True)
class Weight:
    """y = last (first x), or y = last x where ``first`` is None.

    ``source`` tells first factors apart: weights of the same have one in common.
    """

    last: Matrix
    first: Matrix | None
    source: str

    def on_rank(self, rows: Sequence[slice], columns: slice) -> Weight:
        """The part of one rank of several: of the rows of W, or of its columns."""
        last = self.last.at_rows(rows)
        if self.first is None:
            return Weight(last.at_columns(columns), None, self.source)
        return Weight(last, self.first.at_columns(columns), self.source)


def stays_two(spec: Spec) -> bool:
    """Whether a weight is multiplied by two factors; else it is made whole when it is loaded."""
    return format_of(spec.plain).pair and not spec.batch


def weight_of(
    spec: Spec,
    held: Sequence[Tensor],
    source: str,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    integers: bool = False,
) -> Weight:
    """The weight of a spec, of what a checkpoint holds of it: cores, and then indices.

    Low rank that stores no identity gets it back, which changes no number. Integers become numbers.

    Args:
        source: what tells its first factor from others.
        dtype: of the numbers.
        transposed: the layer multiplies with the transpose of the weight.
        integers: products of integers of eight bits are computed as such.
    """
    if integers and spec.precision == "int8" and not transposed:
        assert isinstance(spec, QuantizedSpec)
        if is_dense(spec.inner.format) or stays_two(spec):
            return _in_integers(spec, held, source, dtype)
    cores = format_of(spec).computed(spec, held)
    if stays_two(spec):
        last, first = (core.t() for core in reversed(cores)) if transposed else cores
        return Weight(Matrix(last.to(dtype)), Matrix(first.to(dtype)), source)
    plain = spec.plain
    matrix = format_of(plain).reconstruct(plain, [core.float() for core in cores])
    return Weight(Matrix((matrix.t() if transposed else matrix).to(dtype)), None, source)


def _in_integers(
    spec: QuantizedSpec, held: Sequence[Tensor], source: str, dtype: torch.dtype
) -> Weight:
    form = format_of(spec)
    assert isinstance(form, Quantized)
    left, *others = (Matrix(core.codes, core.scale) for core in form.coded(spec, held))
    if not others:
        return Weight(left, None, source)
    if spec.inner.pivoted:  # an identity has no scale in common with what stands beside it
        first = Matrix(form.computed(spec, held)[1].to(dtype))
    else:
        (first,) = others
    return Weight(left, first, source)
