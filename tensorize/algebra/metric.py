"""How an error of a weight is weighed: ‖R^½ ΔW K^½‖².

R (M, M) and K (N, N) are the identity for ``frobenius``; one of them is the inputs' second moment
for ``input``; for ``loss`` the other is the gradients', and ½ of the sum is a loss. Where entries
are complex, both are Hermitian, and a transpose takes the conjugate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.algebra.triangle import Held, packed, triangular
from tensorize.base.tensors import doubled, singled, squared

# Rows that are taken to float64 at a time, so that a vocabulary is never there twice.
_CHUNK = 4096


@dataclass(frozen=True)
class Metric:
    """One term ``scale · ‖L_Rᵀ ΔW L_K‖²`` with R = L_R L_Rᵀ and K = L_K L_Kᵀ.

    ``left`` and ``right`` are L_R and L_K: Cholesky factors (2-D), square roots of a diagonal
    (1-D), or None for the identity. Of a stack every matrix may have its own (3-D). They are made
    of what is ``held`` of them, which may be a triangle.
    """

    scale: float
    held_left: Held | None
    held_right: Held | None

    @property
    def left(self) -> Tensor | None:
        return None if self.held_left is None else triangular(self.held_left)

    @property
    def right(self) -> Tensor | None:
        return None if self.held_right is None else triangular(self.held_right)

    @property
    def plain(self) -> bool:
        """Whether it is the Frobenius norm."""
        return self.held_left is None and self.held_right is None

    @property
    def mixes_rows(self) -> bool:
        return self.held_left is not None and self.held_left.dim() > 1

    @property
    def apart(self) -> bool:
        """Whether every matrix of a stack has roots of its own."""
        sides = self.held_left, self.held_right
        return any(root is not None and root.dim() == 3 for root in sides)

    def packed(self) -> Metric:
        """The same metric, of whose Cholesky factors only the triangles are held."""
        sides = (self.left, self.right)
        return Metric(self.scale, *(None if root is None else packed(root) for root in sides))

    def of(self, matrix: int) -> Metric:
        """That of one matrix of a stack."""
        sides = (
            r[matrix] if r is not None and r.dim() == 3 else r for r in (self.left, self.right)
        )
        return Metric(self.scale, *sides)

    def transposed(self) -> Metric:
        """The same metric on Wᵀ."""
        return Metric(self.scale, self.held_right, self.held_left)

    def whiten(self, weight: Tensor) -> Tensor:
        """L_Rᵀ W L_K, in float64."""
        return times_root(root_times(self.left, doubled(weight)), self.right)

    def norm(self, weight: Tensor) -> float:
        """scale · ‖L_Rᵀ W L_K‖², for a stack of matrices their sum; in float64."""
        return self.scale * sum(float(squared(part).sum()) for part in self._whitened(weight))

    def gram(self, weight: Tensor) -> Tensor:
        """(L_Rᵀ W L_K)ᵀ (L_Rᵀ W L_K), (…, N, N), in float64.

        Where rows mix, L_Rᵀ W is made in the weight's own precision.
        """
        if weight.dim() == 3:
            return torch.stack([self.of(k).gram(expert) for k, expert in enumerate(weight)])
        if self.mixes_rows:
            part = doubled(root_times(self.left, weight))
            total = part.mH @ part
        else:
            n = weight.shape[-1]
            total = doubled(weight.new_zeros(n, n))
            for part in Metric(1.0, self.held_left, None)._whitened(weight):
                total += part.mH @ part
        right = self.right
        return total if right is None else root_times(right, times_root(total, right))

    def _whitened(self, weight: Tensor) -> Iterator[Tensor]:
        """The whitened weight in pieces of rows, where its rows do not mix."""
        if weight.dim() == 3:
            for k, expert in enumerate(weight):
                yield from self.of(k)._whitened(expert)
        elif self.mixes_rows:
            yield self.whiten(weight)
        else:
            left, right = self.left, self.right
            for start in range(0, weight.shape[0], _CHUNK):
                rows = slice(start, start + _CHUNK)
                yield Metric(1.0, None if left is None else left[rows], right).whiten(weight[rows])


def times_root(weight: Tensor, root: Tensor | None) -> Tensor:
    """W L."""
    if root is None:
        return weight
    root = root.to(weight)
    return weight * root if root.dim() == 1 else weight @ root


def root_times(root: Tensor | None, weight: Tensor) -> Tensor:
    """Lᵀ W."""
    if root is None:
        return weight
    root = root.to(weight)
    return root.unsqueeze(-1) * weight if root.dim() == 1 else root.mH @ weight


def solve_root(root: Tensor | None, basis: Tensor) -> Tensor:
    """L⁻ᵀ B."""
    if root is None:
        return basis
    root = root.to(basis)
    if root.dim() == 1:
        return basis / root.unsqueeze(-1)
    return torch.linalg.solve_triangular(root.mH, basis, upper=True)


def average(metrics: Sequence[Metric]) -> Metric:
    """One metric for several: each term's two sides at unit mean, weighted by the term's size."""
    if len(metrics) == 1:
        return metrics[0]
    pairs = [(_moment(metric.left), _moment(metric.right)) for metric in metrics]
    sizes = [m.scale * _mean(a) * _mean(b) for m, (a, b) in zip(metrics, pairs, strict=True)]
    total = sum(sizes)
    shares = [size / total if total > 0 else 1 / len(sizes) for size in sizes]
    sides = [_averaged([pair[k] for pair in pairs], shares) for k in (0, 1)]
    return Metric(total, *sides)


def _moment(root: Tensor | None) -> Tensor | None:
    if root is None:
        return None
    root = doubled(root)
    return root.square() if root.dim() == 1 else root @ root.mH


def _mean(moment: Tensor | None) -> float:
    if moment is None:
        return 1.0
    return float((moment if moment.dim() == 1 else _diagonal(moment).real).mean())


def _diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1)


def _averaged(moments: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """The root of Σ share · moment / mean; full where one of them is."""
    known = [moment for moment in moments if moment is not None]
    if not known:
        return None
    full = [moment for moment in known if moment.dim() > 1]
    total = torch.zeros_like(full[0] if full else known[0])
    diagonal = _diagonal(total) if full else total
    for moment, share in zip(moments, shares, strict=True):
        if moment is None:
            diagonal.add_(share)
        elif moment.dim() > 1:
            total.add_(moment, alpha=share / _mean(moment))
        else:
            diagonal.add_(moment, alpha=share / _mean(moment))
    return singled(torch.linalg.cholesky(total) if full else total.sqrt())
