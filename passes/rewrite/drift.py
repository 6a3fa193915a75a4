"""The inputs x̃ that a weight sees in the compressed model, beside the x that it saw before.

With C̃ = Σ x̃ x̃ᵀ and the drift E = Σ (x − x̃) x̃ᵀ the map that is best on x̃ is W (I + E C̃⁻¹), which
takes x̃ to W x as well as it can be. Its best rank-r factors in the metric (G of the gradients, C̃ of
the inputs) follow from one whitened SVD, as for the dense weight.

E C̃⁻¹ has as many numbers as there are pairs of inputs. Where the batches have not many times as
many rows, it loses more on others than it gains on them. So it is a ridge regression, towards no
change at all: T = W (I + E (C̃ + δ D)⁻¹), D the diagonal of C̃, and δ is the one with which E and C̃
of most batches lose least on those held out, in the same metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric, root_times
from tensorize.formats.dense import is_dense
from tensorize.ir.sites import Site
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.joint import joint_factors
from tensorize.passes.curves.metric import damped, shrinkage
from tensorize.passes.observe.loss import split
from tensorize.passes.observe.moments import plus, products
from tensorize.passes.observe.rows import input_rows
from tensorize.passes.rewrite.factorize import Cores, quantized
from tensorize.passes.rewrite.runs import WeightRun

Pair = tuple[WeightRun, WeightRun]
"""One batch in the dense and in the compressed model."""

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What is tried as δ, beside no change at all."""

_UNTRIED = 0.3
"""δ where no batch can be held out."""


class Sums:
    """C̃ and E over the rows of some batches."""

    def __init__(self) -> None:
        self.own: Tensor | None = None
        self.drift: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, seen: Tensor) -> None:
        self.own = plus(self.own, products(seen))
        self.drift = plus(self.drift, products(x - seen, seen))
        self.count += len(x)

    def __add__(self, other: Sums) -> Sums:
        """Those over the rows of both, in float64."""
        total = Sums()
        for each in (self, other):
            total.own = plus(total.own, _wide(each.own))
            total.drift = plus(total.drift, _wide(each.drift))
            total.count += each.count
        return total


def _wide(moment: Tensor | None) -> Tensor | None:
    return None if moment is None else moment.to(torch.float64, copy=True)


class Drift:
    """How far a weight's inputs drifted, and those of others with the same input."""

    def __init__(self, site: Site, pairs: Sequence[Pair], masks: Sequence[Tensor | None]) -> None:
        self.site, self._contract = site, ""
        self._inputs, self._masks = _inputs(pairs), masks
        self._learnt, self._held_out = Sums(), Sums()
        parts = split(tuple(zip(pairs, masks, strict=True)))
        for sums, part in zip((self._learnt, self._held_out), parts, strict=True):
            for pair, mask in part:
                self._add(sums, *pair, mask)
        self._all = self._learnt + self._held_out

    def are_of(self, pairs: Sequence[Pair], masks: Sequence[Tensor | None]) -> bool:
        """Whether the runs wait with products of the very same inputs, of which the same count."""
        return _inputs(pairs)[1] == self._inputs[1] and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(masks, self._masks, strict=True)
        )

    def _add(self, sums: Sums, dense: WeightRun, small: WeightRun, mask: Tensor | None) -> None:
        assert dense.matmul is not None
        assert small.matmul is not None
        self._contract = self._contract or dense.matmul.contract
        if {dense.matmul.contract, small.matmul.contract} != {self._contract}:
            return  # a batch that uses it in another way than those before
        x, seen = input_rows(self.site, dense.matmul), input_rows(self.site, small.matmul)
        if x is None or seen is None or x.shape != seen.shape:
            return  # rows of a convolution in three dimensions; a model that takes another way
        if mask is not None and len(mask) == len(x):
            x, seen = x[mask], seen[mask]
        sums.add(x, seen)

    @property
    def seen(self) -> bool:
        """Whether anything but zeros arrived in the compressed model, and nothing infinite."""
        own = self._all.own
        return own is not None and 0 < float(own.diagonal().sum()) < math.inf

    def solve(
        self, weights: Sequence[Tensor], curves: Sequence[Spectrum], specs: Sequence[Any]
    ) -> list[Cores]:
        """The best factors of the maps that take x̃ to W x; several have one first factor.

        Where a spec says so they are rounded, and then the weights after it see that.
        """
        rows = self._contract == "rows"
        matrices = [(weight.t() if rows else weight) for weight in weights]
        metrics = []
        for curve in curves:
            (metric,) = curve.metrics
            outputs = metric.right if rows else metric.left
            metrics.append(Metric(metric.scale, outputs, self._root.float()))
        targets = self._moved(matrices, metrics)
        if len(targets) > 1:
            shared, reader = joint_factors(targets, metrics, specs[0].ranks[0])
            shared = shared.to(targets[0].dtype)
            return [((t.double() @ reader).to(t.dtype), shared) for t in targets]
        (target,), (metric,), (spec,) = targets, metrics, specs
        if rows:
            target, metric = target.t(), metric.transposed()
        cores = (target,) if is_dense(spec.format) else best_factors(target, metric, *spec.ranks)
        if spec.precision is not None:
            return [quantized(spec, cores, (metric,), weights[0].dtype)]
        return [cores]

    @cached_property
    def _root(self) -> Tensor:
        """The Cholesky factor of C̃."""
        own = self._all.own
        assert own is not None
        return torch.linalg.cholesky(damped(own, shrinkage(own, self._all.count)))

    def _moved(self, matrices: Sequence[Tensor], metrics: Sequence[Metric]) -> list[Tensor]:
        """The maps T of some weights, with the ridge that is best for all of them together."""
        ridge = best_ridge(self._learnt, self._held_out, matrices, metrics)
        if ridge == math.inf:
            return list(matrices)
        drift, factor = self._all.drift, _solver(self._all, ridge)
        assert drift is not None
        return [
            (wide + torch.cholesky_solve((wide @ drift).t(), factor).t()).to(matrix.dtype)
            for matrix, wide in ((matrix, matrix.double()) for matrix in matrices)
        ]


def best_ridge(
    learnt: Sums, held_out: Sums, matrices: Sequence[Tensor], metrics: Sequence[Metric]
) -> float:
    """The δ that loses least on rows held out; infinite where no change at all does."""
    if learnt.drift is None or held_out.own is None or held_out.drift is None:
        return _UNTRIED
    wide = [matrix.to(learnt.drift) for matrix in matrices]
    weighted = [_narrow(root_times(m.left, w)) for w, m in zip(wide, metrics, strict=True)]
    moved = [(y @ learnt.drift).t() for y in weighted]
    wanted = [y @ held_out.drift for y in weighted]
    best, least = math.inf, 0.0
    for ridge in RIDGES:
        factor, lost = _solver(learnt, ridge), 0.0
        for to, rows in zip(wanted, moved, strict=True):
            change = torch.cholesky_solve(rows, factor).t()
            # ‖Y (x − x̃) − change x̃‖² less what it is without any change.
            lost += float((change * (change @ held_out.own - 2 * to)).sum(dtype=torch.float64))
        if lost < least:
            best, least = ridge, lost
    return best


def _solver(sums: Sums, ridge: float) -> Tensor:
    """The Cholesky factor of C̃ + δ D."""
    assert sums.own is not None
    return torch.linalg.cholesky(damped(sums.own, 0.0, ridge))


def _narrow(rows: Tensor) -> Tensor:
    """Rows with the same Gram matrix, no more of them than columns."""
    return rows if len(rows) <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def _inputs(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[object]]:
    """What a weight is multiplied with in every run, and what tells whether another's is the same.

    While the first are held, none of their numbers is given to another tensor.
    """
    matmuls = [one.matmul for pair in pairs for one in pair if one.matmul is not None]
    same: list[object] = []
    for matmul in matmuls:
        if matmul.convolution is not None or matmul.x.is_inference():
            # Patches depend on the weight's shape; writes in place are not always counted.
            same.append(object())
        else:
            same.append((id(matmul.x), matmul.x._version, matmul.contract))
    return [matmul.x for matmul in matmuls], same
