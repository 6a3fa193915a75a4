"""What of a model is coded in a metric: its dense weights, and its factors of low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from tensorize.algebra.metric import Metric, average
from tensorize.algebra.pair import metric_of_first, metric_of_second, rounded_pairs
from tensorize.algebra.pivot import whole
from tensorize.algebra.water import Filled, Steps
from tensorize.base.tensors import at_work
from tensorize.capture.matmul import Matmul
from tensorize.coding.groups import Coded
from tensorize.formats.registry import format_of
from tensorize.passes.curves.curve import Spectrum, as_matrix
from tensorize.passes.rewrite.drift import Rows
from tensorize.weight.install import factored
from tensorize.weight.lazy import FactoredWeight


class Weight(Protocol):
    """Tensors that are coded together."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    @property
    def filled(self) -> Sequence[Filled]:
        """The matrices of the tensors, each in its metric."""
        ...

    @property
    def rows(self) -> Sequence[Rows]:
        """Of every tensor, the rows that a call multiplies it by; nothing where no single metric
        is that of one tensor's rows."""
        ...

    @property
    def whole(self) -> float:
        """What it would cost to lose all of it."""
        ...

    def expected(self, theta: float) -> tuple[list[Coded], float]:
        """About what ``coded`` gives, and the distortion that it is expected to cost."""
        ...

    def coded(self, theta: float) -> list[Coded]: ...

    def lost(self, coded: Sequence[Coded]) -> float:
        """The distortion that codes cost."""
        ...


@dataclass(frozen=True, eq=False)
class Whole:
    """A dense weight; its ``matrices`` are several of a stack of experts."""

    tensor: Tensor
    matrices: tuple[Tensor, ...]
    metric: Metric
    rows: Sequence[Rows] = ()

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.tensor,)

    @property
    def whole(self) -> float:
        return sum(self.metric.norm(matrix) for matrix in self.matrices)

    @cached_property
    def filled(self) -> list[Filled]:
        return [Filled(matrix, self.metric) for matrix in self.matrices]

    def expected(self, theta: float) -> tuple[list[Coded], float]:
        found = [each.expected(theta) for each in self.filled]
        coded = _stacked([(each.steps, each.codes) for each in found])
        return [coded], sum(each.lost for each in found)

    def coded(self, theta: float) -> list[Coded]:
        return [_stacked([each.codes(theta) for each in self.filled])]

    def lost(self, coded: Sequence[Coded]) -> float:
        (found,) = coded
        rows = len(self.matrices[0])
        made = found.numbers.split(rows)
        return sum(self.metric.norm(a - b) for a, b in zip(made, self.matrices, strict=True))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Factors U (M, R) of weights that have the second one in common, and what is stored of that,
    V (R, N); one weight by itself has its own."""

    lefts: tuple[Tensor, ...]
    right: Tensor
    order: Tensor | None
    metrics: tuple[Metric, ...]
    convolves: bool = False

    @property
    def tensors(self) -> Sequence[Tensor]:
        return *self.lefts, self.right

    @property
    def rows(self) -> Sequence[Rows]:
        return () if self.convolves else (_plain_rows,) * len(self.tensors)

    @property
    def whole(self) -> float:
        second = self.filled[-1]
        return second.metric.norm(second.matrix)

    @cached_property
    def _numbers(self) -> list[Tensor]:
        return [at_work(tensor.detach()) for tensor in self.tensors]

    @cached_property
    def filled(self) -> list[Filled]:
        *lefts, right = self._numbers
        firsts = [
            Filled(left, metric_of_first(right, self.order, metric))
            for left, metric in zip(lefts, self.metrics, strict=True)
        ]
        return [*firsts, Filled(right, metric_of_second(lefts, self.order, self.metrics))]

    def expected(self, theta: float) -> tuple[list[Coded], float]:
        found = [each.expected(theta) for each in self.filled]
        return [Coded.of(each.steps, each.codes) for each in found], sum(e.lost for e in found)

    def coded(self, theta: float) -> list[Coded]:
        *lefts, right = self._numbers
        made = rounded_pairs(
            lefts,
            right,
            self.order,
            self.metrics,
            lambda matrix, own: Filled(matrix, own).codes(theta),
            lambda found: found[0].numbers(found[1]),
        )
        return [Coded.of(*each) for each in made]

    def lost(self, coded: Sequence[Coded]) -> float:
        *lefts, right = self._numbers
        *made, second = (each.numbers for each in coded)
        total = 0.0
        for before, after, metric in zip(lefts, made, self.metrics, strict=True):
            total += metric.norm(after @ self._whole(second) - before @ self._whole(right))
        return total

    def _whole(self, right: Tensor) -> Tensor:
        return right if self.order is None else whole(right, self.order)


def _plain_rows(matmul: Matmul) -> Tensor | None:
    """The rows of a call that is one product; None where it is another, as a convolution is."""
    x = matmul.x.detach()
    plain = matmul.convolution is None and matmul.bag is None
    return x.reshape(-1, x.shape[-1]) if plain else None


def _stacked(found: Sequence[tuple[Steps, Tensor]]) -> Coded:
    """Matrices below each other, with the same steps of columns."""
    down, codes = (torch.cat(parts) for parts in zip(*((s.down, c) for s, c in found), strict=True))
    return Coded.of(Steps(down, found[0][0].across), codes)


def weights_of(model: nn.Module, curves: Mapping[str, Spectrum]) -> Iterator[Weight]:
    """The weights of a model that have a metric, each once.

    What was rounded to codes already is none of them, nor are trains, blocks, complex numbers, and
    stacks of matrices with a metric each.
    """
    seen: set[int] = set()
    pairs: dict[int, list[tuple[FactoredWeight, Metric, Spectrum]]] = {}
    for name, factors in factored(model):
        first = id(factors.cores[0])
        seen |= {id(core) for core in factors.cores}
        if name in curves and _is_pair(factors):
            metric = average(curves[name].metrics)
            turned = metric.transposed() if factors.frame.transposed else metric
            group = pairs.setdefault(id(factors.cores[1]), [])
            if first not in (id(other.cores[0]) for other, *_ in group):
                group.append((factors, turned, curves[name]))
    for group in pairs.values():
        weights, metrics, own = zip(*group, strict=True)
        (order,) = weights[0].indices or (None,)
        lefts = tuple(weight.cores[0] for weight in weights)
        yield Pairs(lefts, weights[0].cores[1], order, metrics, any(map(_convolves, own)))
    for name, parameter in model.named_parameters():
        curve = curves.get(name)
        if curve is None or id(parameter) in seen or parameter.is_complex():
            continue
        if not curve.site.modes and not curve.apart:
            seen.add(id(parameter))
            matrix = at_work(as_matrix(curve.site, parameter.detach()))
            matrices = tuple(matrix) if matrix.dim() == 3 else (matrix,)
            plain = len(matrices) == len(curve.metrics) == 1 and not curve.site.last_resort
            rows = (_plain_rows,) if plain and not _convolves(curve) else ()
            yield Whole(parameter, matrices, average(curve.metrics), rows)


def _convolves(curve: Spectrum) -> bool:
    """Whether a weight's rows are patches of an image."""
    return any(use.convolves for use in curve.site.uses)


def _is_pair(factors: FactoredWeight) -> bool:
    spec = factors.spec
    plain = spec.precision is None and factors.nonlinearity is None and not spec.batch
    return plain and not factors.dtype.is_complex and format_of(spec).spectral
