"""A format whose numbers are integers of a few bits: any other, from codes and scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorize.algebra import packing
from tensorize.algebra.metric import Metric, average
from tensorize.algebra.pair import rounded_pair
from tensorize.algebra.quantise import codes_for, grid
from tensorize.base.tensors import at_work, is_index
from tensorize.formats.format import Format
from tensorize.formats.low_rank import ordered
from tensorize.ir.machine import Machine, bytes_of, lookup_time
from tensorize.ir.precision import Precision
from tensorize.ir.spec import QuantizedSpec

_PASSES = 6
"""How often every entry is read and written to make a number of its code."""

_SEEN = 3
"""How often an input is read and written to make integers of it."""


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

    def linear(self, x: Tensor) -> Tensor:
        """x (B, N) times Wᵀ in integers: rows of x have a scale of their own; bits are eight."""
        wide = x.float()  # in half precision the largest would be rounded to a code too many
        largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        steps = largest / self.kind.codes[1]
        rounded = (wide / steps).round_().to(torch.int8)
        if self.columns > 1:
            product = torch._int_mm(rounded, self.codes.t())  # pyright: ignore[reportPrivateImportUsage]
        else:  # of which torch 2.13 makes wrong numbers
            product = rounded.int() * self.codes.t()
        return (product * steps * self.scale.float().mT).to(x.dtype)

    def at(self, rows: Tensor) -> Coded:
        """Some rows of the matrix."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Coded(self.kind, self.columns, self.scale[rows], self.codes[rows], zeros)


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
        if contract == "columns" and _in_integers(spec, cores, x):
            return self._in_integers(spec, cores, x, bias)
        return self.numbers.multiply(spec.inner, self.inside(spec, cores), x, contract, bias)

    def _in_integers(
        self, spec: QuantizedSpec, cores: Sequence[Tensor], x: Tensor, bias: Tensor | None
    ) -> Tensor:
        y, (first, *others) = x.reshape(-1, x.shape[-1]), self.coded(spec, cores)
        for right in others:
            order = cores[len(spec.core_shapes)] if spec.inner.pivoted else None
            if order is None:
                y = right.linear(y)
            else:
                kept, rest = ordered(y, order, spec.ranks[0])
                y = kept + right.linear(rest)
        y = first.linear(y)
        y = y if bias is None else y + bias.to(y.dtype)
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
        if contract == "columns" and _by_integers(spec):
            wide = spec.shape[-1] + sum(spec.ranks)
            seen = _SEEN * lookup_time(machine, rows, wide, dtype)
            return seen + self.numbers.time(spec.inner, contract, rows, machine, "int8")
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


def _by_integers(spec: Any) -> bool:
    """Whether products of integers can give what a spec is for, where nobody trains."""
    return spec.kind.bits == 8 and not spec.batch


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


def _in_integers(spec: QuantizedSpec, cores: Sequence[Tensor], x: Tensor) -> bool:
    """Whether this product is one of integers: on a CPU, where no gradient is asked for.

    A trace serves both with gradients and without, so it holds the numbers.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or cores[0].requires_grad)
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    allowed = not (recorded or traced or _Full.asked > 0)
    return allowed and _by_integers(spec) and x.device.type == "cpu"


def _coded(matrix: Tensor, kind: Precision, metric: Metric, dtype: torch.dtype) -> Coded:
    """A matrix (M, N) rounded to codes that lose little in a metric, with scales of a dtype."""
    found = grid(matrix, kind, metric, dtype)
    codes = packing.packed(codes_for(matrix, found, metric), kind.bits)
    zeros = packing.packed(found.zero.to(torch.uint8), kind.bits) if kind.offset else None
    return Coded(kind, matrix.shape[1], found.scale.to(dtype), codes, zeros)
