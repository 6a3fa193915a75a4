"""Low rank: W = U V, the format that the whitened singular value decomposition gives at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.factors import best_factors, exact_factors
from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.algebra.pivot import (
    fitted,
    pivoted,
    pivoted_in_parts,
    plain,
    rounded,
    rounded_left,
    whole,
)
from tensorize.algebra.reconstruct import reconstruct
from tensorize.base.tensors import at_work
from tensorize.formats.format import Chain, TensorTrain
from tensorize.formats.order import in_order, in_order_time, inverse
from tensorize.ir.machine import Machine, bytes_of, lookup_time, matmul_time
from tensorize.ir.precision import INTEGERS, ONE_DIGIT, Precision
from tensorize.ir.sites import Site
from tensorize.ir.spec import LOW_RANK, Index, Spec, TTSpec

_PAYS = 0.95
"""The share of a matrix's entries from which on dense is taken to be worth the rest."""

# A tied weight with more entries keeps the factors of its averaged metric.
_LARGEST_ALS = 4_000_000


@dataclass(frozen=True)
class EveryRank(Spec):
    """Low rank of a matrix (m, n) at each of an array of ranks: what it costs is an array too."""

    shape: tuple[int, int]
    every: np.ndarray
    pivoted: int = 0
    precision: str | None = None  # type: ignore[assignment]
    inputs: str = ONE_DIGIT
    format = LOW_RANK

    @property
    def kind(self) -> Precision:
        """What the precision is."""
        assert self.precision is not None
        return INTEGERS[self.precision]

    @property
    def inner(self) -> EveryRank:
        """What the integers of a precision stand for."""
        return replace(self, precision=None)

    def bytes(self, itemsize: int, holders: int = 1) -> Any:
        if self.precision is None:
            return super().bytes(itemsize, holders)
        (m, n), kind = self.shape, self.kind
        sides = (m, self.every), (self.every, n - (self.every if self.pivoted else 0))
        order = sum(index.bytes for index in self.indices)
        return holders * order + sum(kind.bytes(*side, itemsize, holders) for side in sides)

    @property
    def ranks(self) -> tuple[Any]:  # type: ignore[override]
        return (self.every,)

    @property
    def indices(self) -> tuple[Index, ...]:  # type: ignore[override]
        if not self.pivoted:
            return ()
        return (Index("order", (self.shape[1] // self.pivoted,), "int32"),)

    @property
    def plain(self) -> EveryRank:
        return replace(self, pivoted=0)

    @property
    def parameters(self) -> Any:
        m, n = self.shape
        return self.every * (m + n - (self.every if self.pivoted else 0))


def largest_that_pays(m: int, n: int) -> int:
    """The largest rank of a matrix (m, n) that has clearly fewer numbers: r (m + n - r)."""
    sides = m + n
    return max(1, int((sides - math.sqrt(sides**2 - 4 * _PAYS * m * n)) / 2))


class LowRank(Chain):
    """Two factors, U (…, M, r) and V (…, r, N).

    Pivoted, V is the identity in r columns, which are not stored: cores are U', V' (…, r, N - r),
    and the order of the columns (…, N / g), one for each matrix (``algebra.pivot``).
    """

    name = LOW_RANK
    title = "low rank"
    colors = "#1d5fbf", "#e3eefc"
    unasked = spectral = pair = True
    kernels = "pair"

    def multiply(
        self, spec: TTSpec, cores: Sequence[Tensor], x: Tensor, contract: str, bias: Tensor | None
    ) -> Tensor:
        left, right = cores[:2]
        if contract == "columns":
            return F.linear(product(x, *cores[1:]), left, bias)
        narrow = F.linear(x, left.t())
        if not spec.pivoted:
            return F.linear(narrow, right.t(), bias)
        y = widen(narrow, right, cores[2])
        return y if bias is None else y + bias

    def reconstruct(self, spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
        if spec.pivoted:
            left, right = plain(*cores)
            return left @ right
        return reconstruct(spec, cores)

    def stored(
        self,
        spec: TTSpec,
        cores: Sequence[Tensor],
        dtype: torch.dtype,
        first: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        left, right = cores
        if first:
            if spec.pivoted:
                left = rounded_left(fitted(left, right, *first), first[0], dtype)
            return left.to(dtype), *first
        if not spec.pivoted:
            return super().stored(spec, cores, dtype)
        if spec.batch:
            each = [self.stored(spec.single, one, dtype) for one in zip(*cores, strict=True)]
            if len({len(order) for _, _, order in each}) > 1:  # one has no groups that do
                return self.stored(spec.in_order_of(1), cores, dtype)
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        # What was aligned moves none: other factors get an order of their own.
        together = 1 if spec.pivoted == spec.shape[-1] else spec.pivoted
        found = rounded(pivoted(left, right, neighbours=together), dtype)
        return found.left.contiguous(), found.rest.contiguous(), found.order

    def stored_in_parts(
        self, cores: Sequence[Tensor], dtype: torch.dtype, parts: int
    ) -> tuple[Tensor, ...] | None:
        """What is stored pivoted, with as many kept columns in each of so many equal parts of the
        input; None where it would lose too much."""
        left, right = cores
        found = pivoted_in_parts(left, right, parts)
        if found is None:
            return None
        found = rounded(found, dtype)
        return found.left.contiguous(), found.rest.contiguous(), found.order

    def as_stored(self, spec: TTSpec, cores: Sequence[Tensor]) -> TTSpec:
        if not spec.pivoted:
            return spec
        return spec.in_order_of(spec.shape[-1] // cores[2].shape[-1])

    def width(self, cores: Sequence[Tensor]) -> int:
        return cores[1].shape[0]

    def computed(self, spec: TTSpec, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return plain(*cores) if spec.pivoted else tuple(cores)

    def lookup(self, spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        narrow = F.embedding(rows, cores[0])
        if spec.pivoted:
            return widen(narrow, cores[1], cores[2])
        return F.linear(narrow, cores[1].t())

    def fits(self, site: Site) -> bool:
        return True

    def factors(
        self,
        spec: TTSpec,
        weight: Tensor,
        metrics: Sequence[Metric],
        exact: TensorTrain[TTSpec] | None = None,
    ) -> tuple[Tensor, ...]:
        (rank,) = spec.ranks
        if rank >= min(weight.shape[-2:]):
            return exact_factors(weight)
        found = best_factors(weight, average(metrics), rank)
        if self.nested(tuple(weight.shape), len(metrics)):
            return found
        return self.improved(spec.plain, found, at_work(weight), metrics)

    def nested(self, shape: Sequence[int], metrics: int) -> bool:
        return metrics == 1 or len(shape) == 3 or math.prod(shape) > _LARGEST_ALS

    def nearest(self, spec: TTSpec, weight: Tensor) -> list[Tensor]:
        return list(best_factors(weight, Metric(1.0, None, None), spec.ranks[0]))

    def energy(self, spec: TTSpec, cores: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
        total = cores[0].real.new_zeros(())
        for metric in metrics:  # by small Gram matrices
            u, v = root_times(metric.left, cores[0]), times_root(cores[1], metric.right)
            total = total + metric.scale * ((u.mH @ u) * (v @ v.mH).mT).sum().real
        return total

    def inner(self, spec: TTSpec, cores: Sequence[Tensor], other: Tensor) -> Tensor:
        return ((other @ cores[1].mH) * cores[0].conj()).sum().real

    def flops(self, spec: TTSpec, contract: str) -> Any:
        (m, n), (rank,) = spec.shape[-2:], spec.ranks
        inner = n - rank if spec.pivoted else n
        if contract == "whole":  # rebuilt at every call, one row being the worst
            return 2 * rank * m * inner + 2 * m * n
        return 2 * rank * (inner if contract == "lookup" else m + inner)

    def time(self, spec: TTSpec, contract: str, rows: int, machine: Machine, dtype: str) -> Any:
        (m, n), (rank,) = spec.shape[-2:], spec.ranks
        inner, ordered = n, 0.0
        if spec.pivoted:  # one pass more over the side that has an order
            inner = n - rank
            ordered = in_order_time(machine, rows, n, dtype, spec.pivoted)
        if contract == "whole":  # rebuilt, then used as a dense one
            took = matmul_time(machine, m, rank, inner, dtype)
            return took + ordered + matmul_time(machine, rows, n, m, dtype)
        if contract == "lookup":
            took = lookup_time(machine, rows, rank, dtype)
            return took + matmul_time(machine, rows, rank, inner, dtype) + ordered
        if contract == "columns":
            took = first_time(spec, rows, machine, dtype)
            return took + matmul_time(machine, rows, rank, m, dtype)
        took = matmul_time(machine, rows, m, rank, dtype)
        return took + matmul_time(machine, rows, rank, inner, dtype) + ordered


def first_time(spec: Spec, rows: int, machine: Machine, dtype: str, parts: int = 1) -> Any:
    """Microseconds of the product with the input, which weights of one first factor have once.

    ``parts``: of how many equal parts of the input it is the product with one.
    """
    n, (rank,) = spec.shape[-1], spec.ranks
    if not spec.pivoted:
        return matmul_time(machine, rows, n // parts, rank, dtype)
    took = matmul_time(machine, rows, (n - rank) // parts, rank, dtype)
    took += in_order_time(machine, rows, n // parts, dtype, spec.pivoted)
    return took + _added_time(machine, rows, rank / parts, dtype)


def _added_time(machine: Machine, rows: Any, rank: Any, dtype: str) -> Any:
    """Microseconds of what is added to a product: read, the product being in the cache still.

    Its call is a small part of a matmul's.
    """
    return 1e6 * bytes_of(dtype) * rows * rank / machine.bandwidth


def product(x: Tensor, rest: Tensor, order: Tensor | None = None) -> Tensor:
    """x (…, N) times Vᵀ, (…, R); V whose columns have an order is [I | V']: x_kept + x_rest V'ᵀ."""
    if order is None:
        return F.linear(x, rest)
    if x.layout is not torch.strided:  # of such an x nothing can be taken apart
        return F.linear(x, whole(rest, order))
    kept, others = ordered(x, order, rest.shape[0])
    y = F.linear(others, rest)
    # A graph sees that layers of one first factor compute the same, unless somebody writes to it.
    return y + kept if torch.compiler.is_compiling() else y.add_(kept)


def ordered(x: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The columns of x (…, N) that V is the identity in, and the others: (…, R), (…, N - R)."""
    found = in_order(x, order)
    if torch.compiler.is_compiling():  # of slices a graph sees that they are the same
        return found[..., :rank], found[..., rank:]
    kept, others = found.split_with_sizes((rank, found.shape[-1] - rank), -1)
    return kept, others


def widen(narrow: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    """x (…, R) times [I | V'], its columns put in their place: (…, N)."""
    return together(narrow, F.linear(narrow, rest.t()), order)


def together(kept: Tensor, others: Tensor, order: Tensor) -> Tensor:
    """Columns that V is the identity in (…, R), and the others (…, N - R), in their place."""
    return in_order(torch.cat([kept, others], dim=-1), inverse(order))
