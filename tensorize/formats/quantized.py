"""A format whose numbers are integers of a few bits: any other, from codes and scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensorize.algebra import packing
from tensorize.algebra.metric import Metric, average
from tensorize.algebra.pair import rounded_pair
from tensorize.algebra.quantise import codes_for, grid
from tensorize.base.tensors import at_work, is_index
from tensorize.formats import packs
from tensorize.formats.format import Format
from tensorize.formats.integers import Pack, digits_of, rounding_time
from tensorize.formats.low_rank import ordered, together
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.machine import Machine, bytes_of
from tensorize.ir.precision import FLOAT, Precision

_PASSES = 6
"""How often every entry is read and written to make a number of its code."""


@dataclass(frozen=True)
class Coded:
    """A matrix (…, M, N) as it is held: scales (…, M, groups), packed codes, packed zero points."""

    kind: Precision
    columns: int
    scale: Tensor
    codes: Tensor
    zeros: Tensor | None

    def values(self) -> Tensor:
        """The numbers, in the dtype of the scales; scales get gradients."""
        return packing.values(self.kind, self.columns, self.scale, self.codes, self.zeros)

    def pack(self, *, columns: bool) -> Pack:
        """For products of integers with what meets its columns, or its rows."""
        if self.kind.bits == 8 and columns:
            return Pack.held(self.scale, self.codes)
        numbers = self.values().detach()
        return Pack.of(numbers if columns else numbers.mT)

    def at(self, rows: Tensor) -> Coded:
        """Some rows of the matrix."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Coded(self.kind, self.columns, self.scale[rows], self.codes[rows], zeros)

    def with_zeros_of(self, groups: int, part: slice) -> Coded:
        """The same with the zero points of a part of so many groups, of those for all of them."""
        assert self.zeros is not None
        bits = self.kind.bits
        own = packing.packed(packing.unpacked(self.zeros, bits, groups)[..., part], bits)
        return replace(self, zeros=own)


class Quantized(Format[QuantizedSpec]):
    """Another format's cores, rounded. Its own say what is done with the numbers."""

    def __init__(self, numbers: Format[Any]) -> None:
        self.numbers = numbers
        self.name, self.title, self.colors = numbers.name, numbers.title, numbers.colors

    def coded(self, spec: QuantizedSpec, held: Sequence[Tensor]) -> list[Coded]:
        """Every core, of what is held: scales, the inner spec's indices, codes and zero points."""
        count = len(spec.core_shapes)
        rest = iter(held[count + len(spec.inner.indices) :])
        shapes = zip(held, spec.inner.core_shapes, strict=False)
        return [
            Coded(spec.kind, shape[-1], scale, next(rest), next(rest) if spec.kind.offset else None)
            for scale, shape in shapes
        ]

    def inside(self, spec: QuantizedSpec, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Cores and indices of the inner spec, as numbers."""
        count = len(spec.core_shapes)
        indices = held[count : count + len(spec.inner.indices)]
        return *(core.values() for core in self.coded(spec, held)), *indices

    def reconstruct(self, spec: QuantizedSpec, cores: Sequence[Tensor]) -> Tensor:
        return self.numbers.reconstruct(spec.inner, self.inside(spec, cores))

    def computed(self, spec: QuantizedSpec, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.numbers.computed(spec.inner, self.inside(spec, cores))

    def stored(
        self,
        spec: QuantizedSpec,
        cores: Sequence[Tensor],
        dtype: torch.dtype,
        first: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        assert not first, "codes of a first factor in common are not known yet"
        return tuple(core if is_index(core) else core.to(dtype) for core in cores)

    def multiply(
        self, spec: QuantizedSpec, cores: Sequence[Tensor], x: Tensor, contract: str,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if not self.in_integers(spec, cores, x, contract):
            return self.numbers.multiply(spec.inner, self.inside(spec, cores), x, contract, bias)
        if _needs_packs(spec, contract) and torch.compiler.is_compiling():
            y = packs.OPERATION(x, list(cores), contract, spec.text)
        else:
            y = self.by_packs(spec, cores, x, contract)
        return y if bias is None else y + bias.to(y.dtype)

    def in_integers(
        self, spec: QuantizedSpec, cores: Sequence[Tensor], x: Tensor, contract: str
    ) -> bool:
        """Whether a product is one of integers: on a CPU, where no gradient is asked for.

        A trace serves both with gradients and without, so it holds the numbers; so does a graph
        that is exported, where it would have to hold packs.
        """
        if contract == "lookup" or not _by_integers(spec) or x.device.type != "cpu":
            return False
        recorded = torch.is_grad_enabled() and (x.requires_grad or cores[0].requires_grad)
        traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        exported = _needs_packs(spec, contract) and torch.compiler.is_exporting()
        if recorded or traced or exported or _Full.asked > 0:
            return False
        # Transforms of functions know no products of integers.
        return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()

    def by_packs(
        self, spec: QuantizedSpec, cores: Sequence[Tensor], x: Tensor, contract: str
    ) -> Tensor:
        """x Wᵀ or x W, where ``in_integers``: products of integers with one core after another."""
        columns = contract == "columns"

        def made() -> list[Pack]:
            return [core.pack(columns=columns) for core in self.coded(spec, cores)]

        kept = _needs_packs(spec, contract)
        left, *others = packs.packs_of(cores, contract, made) if kept else made()
        order = cores[len(spec.core_shapes)] if spec.inner.pivoted else None
        y = x.reshape(-1, x.shape[-1])
        for right in others if columns else ():
            same, rest = (0, y) if order is None else ordered(y, order, spec.ranks[0])
            y = same + right.linear(rest, spec.inputs)
        y = left.linear(y, spec.inputs)
        for right in () if columns else others:
            rest = right.linear(y, spec.inputs)
            y = rest if order is None else together(y, rest, order)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def lookup(self, spec: QuantizedSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        # A row needs no more of the first core than its own; and no more of a dense table.
        first, *others = self.coded(spec, cores)
        count = len(spec.core_shapes)
        held = first.at(rows.reshape(-1)).values(), *(core.values() for core in others)
        indices = cores[count : count + len(spec.inner.indices)]
        every = torch.arange(rows.numel(), device=rows.device).reshape(rows.shape)
        return self.numbers.lookup(spec.inner, (*held, *indices), every)

    def rows_apart(self, spec: QuantizedSpec) -> int | None:
        return self.numbers.rows_apart(spec.inner)

    def clear_rows(self, spec: QuantizedSpec, cores: Sequence[Tensor], rows: Tensor) -> None:
        k = self.rows_apart(spec)
        assert k is not None
        cores[k][rows] = 0  # the scales: whatever their codes are, rows stand for zero

    def flops(self, spec: QuantizedSpec, contract: str) -> Any:
        return self.numbers.flops(spec.inner, contract)

    def time(
        self, spec: QuantizedSpec, contract: str, rows: int, machine: Machine, dtype: str
    ) -> Any:
        if contract != "lookup" and _by_integers(spec) and machine.multiplies_integers:
            digits = digits_of(spec.inputs)
            side = spec.shape[-1 if contract == "columns" else -2]
            around = rounding_time(machine, rows, (side, *spec.ranks), dtype, digits)
            return around + self.numbers.time(spec.inner, contract, digits * rows, machine, "int8")
        took = self.numbers.time(spec.inner, contract, rows, machine, dtype)
        made = spec.parameters if contract != "lookup" else rows * spec.shape[-1]
        return took + 1e6 * _PASSES * 2 * made * bytes_of(dtype) / machine.bandwidth

    # ------------------------------------------------------------------------------ the rounding

    def rounded(  # type: ignore[override]
        self, spec: QuantizedSpec, cores: Sequence[Tensor], metrics: Sequence[Metric],
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What is held of the cores of ``spec.inner``, in the order of the spec.

        Args:
            cores: those of the inner spec, with its indices.
            metrics: those of the weight.
            dtype: of the scales.
        """
        if spec.batch:
            experts = zip(*(core.unbind(0) for core in cores), strict=True)
            each = [self.rounded(spec.single, one, metrics, dtype) for one in experts]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        metric, count = average(metrics), len(spec.core_shapes)
        numbers, indices = [at_work(core) for core in cores[:count]], tuple(cores[count:])
        if count == 1:
            found = [_coded(numbers[0], spec.kind, metric, dtype)]
        else:
            (order,) = indices or (None,)
            left, right = numbers
            found = rounded_pair(
                left,
                right,
                order,
                metric,
                lambda m, own: _coded(m, spec.kind, own, dtype),
                Coded.values,
            )
        held = [part for core in found for part in (core.codes, core.zeros) if part is not None]
        return *(core.scale for core in found), *indices, *held


def _needs_packs(spec: QuantizedSpec, contract: str) -> bool:
    """Whether products of integers need other codes than those that are held: scales are of rows
    of the weight, and eight bits are one code."""
    return spec.kind.bits < 8 or contract == "rows"


def _by_integers(spec: Any) -> bool:
    """Whether products of integers are to give what a spec is for, where nobody trains."""
    return spec.inputs != FLOAT and not spec.batch


class _Full:
    """How many ask for inputs in full now, in whatever thread: a refit runs its batches in some."""

    asked = 0


@contextlib.contextmanager
def inputs_in_full() -> Iterator[None]:
    """In here no input is rounded: what a model computes is what its weights say."""
    _Full.asked += 1
    try:
        yield
    finally:
        _Full.asked -= 1


def _coded(matrix: Tensor, kind: Precision, metric: Metric, dtype: torch.dtype) -> Coded:
    """A matrix (M, N) rounded to codes that lose little in a metric, with scales of a dtype."""
    found = grid(matrix, kind, metric, dtype)
    codes = packing.packed(codes_for(matrix, found, metric), kind.bits)
    zeros = packing.packed(found.zero.to(torch.uint8), kind.bits) if kind.offset else None
    return Coded(kind, matrix.shape[1], found.scale.to(dtype), codes, zeros)
