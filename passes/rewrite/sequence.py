"""Weights in the order of their use, each with what it meets in a dense and in a small model.

Every batch runs through both models at once, and waits at each weight until that is settled; what
the small model multiplies the later ones by is then what they will really see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tensorize.capture.matmul import Matmul
from tensorize.ir.sites import Batch
from tensorize.passes.curves.metric import shrink, shrinkage
from tensorize.passes.observe.moments import plus, products
from tensorize.passes.rewrite.runs import WeightRun

Pair = tuple[WeightRun, WeightRun]
"""A batch in the dense model, and in the small one."""

Rows = Callable[[Matmul], Tensor | None]
"""The rows (rows, N) that a weight is multiplied by in a call; None where they cannot be told."""

Masks = Callable[[Batch, str], Tensor | None]
"""Which rows of a batch count for a weight; None: all do."""


def in_order(
    order: Sequence[str],
    batches: Sequence[Batch],
    pair: Callable[[Batch], Pair],
    rows: Mapping[str, Rows],
    masks: Masks,
) -> Iterator[tuple[str, Moments]]:
    """Every weight in turn, with its moments; the runs go on when the next one is asked for.

    To be closed: what waits is stopped then.
    """
    runs: list[Pair] = []
    moments: Moments | None = None
    try:
        runs.extend(map(pair, batches))
        for place, name in enumerate(order):
            there = [each for each in runs if all(one.reach(place) for one in each)]
            counted = [masks(each[0].batch, name) for each in there]
            if moments is None or not moments.are_of(there, counted):
                moments = Moments(rows[name], there, counted)
            yield name, moments
    finally:
        for each in runs:
            for one in each:
                one.stop()


class Moments:
    """K = Σ x x̃ᵀ and C̃ = Σ x̃ x̃ᵀ of one weight, in float64, and of others of the same input.

    ``size`` is Σ ‖x‖².
    """

    def __init__(self, rows: Rows, runs: Sequence[Pair], masks: Sequence[Tensor | None]) -> None:
        self._rows, self.count, self.size = rows, 0, 0.0
        self._cross: Tensor | None = None
        self._own: Tensor | None = None
        self.contract = "columns"
        self._inputs, self._masks = _inputs(runs), masks
        for pair, mask in zip(runs, masks, strict=True):
            self._add(*pair, mask)

    def are_of(self, runs: Sequence[Pair], masks: Sequence[Tensor | None]) -> bool:
        """Whether the runs wait with products of the very same inputs, of which the same count."""
        return _inputs(runs)[1] == self._inputs[1] and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(masks, self._masks, strict=True)
        )

    def _add(self, dense: WeightRun, small: WeightRun, mask: Tensor | None) -> None:
        assert dense.matmul is not None
        assert small.matmul is not None
        if self.count == 0:
            self.contract = dense.matmul.contract
        if {dense.matmul.contract, small.matmul.contract} != {self.contract}:
            return  # a batch that uses it in another way than those before
        x, seen = self._rows(dense.matmul), self._rows(small.matmul)
        if x is None or seen is None or x.shape != seen.shape:
            return  # rows of a convolution in three dimensions; a model that takes another way
        if mask is not None and len(mask) == len(x):
            x, seen = x[mask], seen[mask]
        self._cross = plus(self._cross, products(x, seen))
        self._own = plus(self._own, products(seen))
        self.count += len(x)
        self.size += float(x.square().sum(dtype=torch.float64))

    @property
    def seen(self) -> bool:
        """Whether anything but zeros arrived in the compressed model, and nothing infinite."""
        return self._own is not None and 0 < float(self._own.diagonal().sum()) < math.inf

    def towards(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The maps W K C̃⁻¹ that take x̃ to W x, and the Cholesky factor of C̃.

        Where the contraction is with ``rows``, weights and maps are those of Wᵀ.
        """
        factor, cross = self._damped
        matrices = [weight.double() for weight in weights]
        # K C̃⁻¹ is one for all weights of an input; for few rows W K C̃⁻¹ from the left is less work.
        if sum(map(len, matrices)) >= len(factor):
            maps = [matrix @ self._transfer for matrix in matrices]
        else:
            maps = [torch.cholesky_solve((m @ cross).t(), factor).t() for m in matrices]
        return [m.to(w.dtype) for m, w in zip(maps, weights, strict=True)], factor

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of C̃, and K; what is added to both is noise that both models see."""
        assert self._cross is not None
        assert self._own is not None
        mean = float(self._own.diagonal().mean())
        share = shrinkage(self._own, self.count)
        cross, own = (shrink(moment, share, mean) for moment in (self._cross, self._own))
        return torch.linalg.cholesky(own), cross

    @cached_property
    def _transfer(self) -> Tensor:
        """K C̃⁻¹."""
        factor, cross = self._damped
        return torch.cholesky_solve(cross.t(), factor).t()


def _inputs(runs: Sequence[Pair]) -> tuple[list[Tensor], list[object]]:
    """What a weight is multiplied with in every run, and what tells whether another's is the same.

    While the first are held, none of their numbers is given to another tensor.
    """
    matmuls = [one.matmul for pair in runs for one in pair if one.matmul is not None]
    same: list[object] = []
    for matmul in matmuls:
        if matmul.convolution is not None or matmul.x.is_inference():
            # Patches depend on the weight's shape; writes in place are not always counted.
            same.append(object())
        else:
            same.append((id(matmul.x), matmul.x._version, matmul.contract))
    return [matmul.x for matmul in matmuls], same
