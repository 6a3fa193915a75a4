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
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tensorize.algebra.metric import root_times
from tensorize.algebra.triangle import Held, add_products, hermitian, packed
from tensorize.capture.matmul import Matmul
from tensorize.passes.curves.metric import damped, shrinkage
from tensorize.passes.observe.loss import split
from tensorize.passes.observe.moments import products, widened
from tensorize.passes.rewrite.runs import WeightRun

Pair = tuple[WeightRun, WeightRun]
"""A batch in the dense model, and in the small one."""

Rows = Callable[[Matmul], Tensor]
"""The rows (rows, N) that a weight is multiplied by in a call."""

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What is tried as δ, beside no change at all."""

_UNTRIED = 0.3
"""δ where no batch can be held out."""


class Sums:
    """C̃ and E over the rows of some batches."""

    def __init__(self) -> None:
        self._own: Held | None = None
        self._drift: Tensor | None = None

    def add(self, x: Tensor, seen: Tensor) -> None:
        x, seen = widened(x), widened(seen)
        if self._own is None or self._drift is None:
            self._own, self._drift = packed(products(seen)), products(x - seen, seen)
        else:
            add_products(self._own, seen)
            self._drift.addmm_((x - seen).t(), seen.conj())

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """C̃ and E (N, N); None where there are no rows."""
        if self._own is None or self._drift is None:
            return None
        return hermitian(self._own), self._drift


class Drift:
    """How far the inputs of a weight drifted, and those of others with the same input.

    They are ``count`` rows, used as ``contract`` says; ``size`` is Σ ‖x‖².
    """

    def __init__(self, rows: Rows, pairs: Sequence[Pair], masks: Sequence[Tensor | None]) -> None:
        self._rows, self.contract, self.count, self.size = rows, "", 0, 0.0
        self._inputs, self._masks = _inputs(pairs), masks
        self._learnt, self._held_out = Sums(), Sums()
        parts = split(tuple(zip(pairs, masks, strict=True)))
        for sums, part in zip((self._learnt, self._held_out), parts, strict=True):
            for pair, mask in part:
                self._add(sums, *pair, mask)

    def are_of(self, pairs: Sequence[Pair], masks: Sequence[Tensor | None]) -> bool:
        """Whether the runs wait with products of the very same inputs, of which the same count."""
        return _inputs(pairs)[1] == self._inputs[1] and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(masks, self._masks, strict=True)
        )

    def _add(self, sums: Sums, dense: WeightRun, small: WeightRun, mask: Tensor | None) -> None:
        assert dense.matmul is not None
        assert small.matmul is not None
        self.contract = self.contract or dense.matmul.contract
        if {dense.matmul.contract, small.matmul.contract} != {self.contract}:
            return  # a batch that uses it in another way than those before
        x, seen = self._rows(dense.matmul), self._rows(small.matmul)
        if x.shape != seen.shape:
            return  # the compressed model takes another way
        if mask is not None and len(mask) == len(x):
            x, seen = x[mask], seen[mask]
        sums.add(x, seen)
        self.count += len(x)
        self.size += float(x.square().sum(dtype=torch.float64))

    @cached_property
    def all(self) -> tuple[Tensor, Tensor]:
        """C̃ and E (N, N) over all rows, in float64."""
        there = [m for m in (self._learnt.matrices(), self._held_out.matrices()) if m is not None]
        own, drift = (sum(one.double() for one in side) for side in zip(*there, strict=True))
        return own, drift

    @property
    def seen(self) -> bool:
        """Whether anything but zeros arrived in the compressed model, and nothing infinite."""
        return self.count > 0 and 0 < float(self.all[0].diagonal().sum()) < math.inf

    def towards(
        self, weights: Sequence[Tensor], roots: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        """The maps T that take x̃ to W x, and the Cholesky factor of C̃.

        ``roots`` are those of the weights' outputs, in which what is lost counts. Where the
        contraction is with ``rows``, weights and maps are those of Wᵀ.
        """
        ridge = best_ridge(self._learnt, self._held_out, weights, roots)
        if ridge == math.inf:
            return list(weights), self._root
        own, drift = self.all
        factor = _solver(own, ridge)
        maps = [
            wide + torch.cholesky_solve((wide @ drift).t(), factor).t()
            for wide in (weight.double() for weight in weights)
        ]
        return [m.to(w.dtype) for m, w in zip(maps, weights, strict=True)], self._root

    @cached_property
    def _root(self) -> Tensor:
        """The Cholesky factor of C̃."""
        own, _ = self.all
        return torch.linalg.cholesky(damped(own, shrinkage(own, self.count)))


def best_ridge(
    learnt: Sums, held_out: Sums, weights: Sequence[Tensor], roots: Sequence[Tensor | None]
) -> float:
    """The δ that loses least on rows held out; infinite where no change at all does."""
    learns, judges = learnt.matrices(), held_out.matrices()
    if learns is None or judges is None:
        return _UNTRIED
    own, drift = learns
    weighted = [_narrow(root_times(r, w.to(drift))) for w, r in zip(weights, roots, strict=True)]
    moved = [(y @ drift).t() for y in weighted]
    wanted = [y @ judges[1] for y in weighted]
    best, least = math.inf, 0.0
    for ridge in RIDGES:
        factor, lost = _solver(own, ridge), 0.0
        for to, rows in zip(wanted, moved, strict=True):
            change = torch.cholesky_solve(rows, factor).t()
            # ‖Y (x − x̃) − change x̃‖² less what it is without any change.
            lost += float((change * (change @ judges[0] - 2 * to)).sum(dtype=torch.float64))
        if lost < least:
            best, least = ridge, lost
    return best


def _solver(own: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of C̃ + δ D."""
    return torch.linalg.cholesky(damped(own, 0.0, ridge))


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
