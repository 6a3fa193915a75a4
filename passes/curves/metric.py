"""How an error of a weight is weighed: ‖R^½ ΔW K^½‖², from the second moments of a site.

R (M, M) and K (N, N) are the identity for ``frobenius``; one of them is the inputs' second moment
for ``input``; for ``loss`` the other is the gradients', and ½ of the sum is a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.base.errors import AnalysisError, ModelError
from tensorize.ir.sites import Site
from tensorize.passes.observe.moments import Moments, Term

# Share of the mean eigenvalue that is added to a second moment, however many rows it is of.
DAMPING = 0.01
# Of a diagonal: the least share of it that is spread evenly.
_DIAGONAL_DAMPING = 0.05 / 1.05
# Rows that are taken to float64 at a time, so that a vocabulary is never there twice.
_CHUNK = 4096


@dataclass(frozen=True)
class Metric:
    """One term ``scale · ‖L_Rᵀ ΔW L_K‖²`` with R = L_R L_Rᵀ and K = L_K L_Kᵀ.

    ``left`` and ``right`` are L_R and L_K: Cholesky factors (2-D), square roots of a diagonal
    (1-D), or None for the identity.
    """

    scale: float
    left: Tensor | None
    right: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether it is the Frobenius norm."""
        return self.left is None and self.right is None

    @property
    def mixes_rows(self) -> bool:
        return self.left is not None and self.left.dim() == 2

    def transposed(self) -> Metric:
        """The same metric on Wᵀ."""
        return Metric(self.scale, self.right, self.left)

    def whiten(self, weight: Tensor) -> Tensor:
        """L_Rᵀ W L_K, in float64."""
        return times_root(root_times(self.left, weight.double()), self.right)

    def norm(self, weight: Tensor) -> float:
        """scale · ‖L_Rᵀ W L_K‖², for a stack of matrices their sum; in float64."""
        return self.scale * sum(float(part.square().sum()) for part in self._whitened(weight))

    def gram(self, weight: Tensor) -> Tensor:
        """(L_Rᵀ W L_K)ᵀ (L_Rᵀ W L_K), (…, N, N), in float64.

        Where rows mix, L_Rᵀ W is made in the weight's own precision.
        """
        if weight.dim() == 3:
            return torch.stack([self.gram(expert) for expert in weight])
        if self.mixes_rows:
            part = root_times(self.left, weight).double()
            total = part.t() @ part
        else:
            n = weight.shape[-1]
            total = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
            for part in Metric(1.0, self.left, None)._whitened(weight):
                total += part.t() @ part
        inner = times_root(total, self.right)
        return inner if self.right is None else root_times(self.right, inner)

    def _whitened(self, weight: Tensor) -> Iterator[Tensor]:
        """The whitened weight in pieces of rows, where its rows do not mix."""
        if weight.dim() == 3:
            for expert in weight:
                yield from self._whitened(expert)
        elif self.mixes_rows:
            yield self.whiten(weight)
        else:
            for start in range(0, weight.shape[0], _CHUNK):
                rows = slice(start, start + _CHUNK)
                left = None if self.left is None else self.left[rows]
                yield Metric(1.0, left, self.right).whiten(weight[rows])


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
    return root.unsqueeze(-1) * weight if root.dim() == 1 else root.t() @ weight


def solve_root(root: Tensor | None, basis: Tensor) -> Tensor:
    """L⁻ᵀ B."""
    if root is None:
        return basis
    root = root.to(basis)
    if root.dim() == 1:
        return basis / root.unsqueeze(-1)
    return torch.linalg.solve_triangular(root.t(), basis, upper=True)


def site_metrics(site: Site, moments: Moments | None, metric: str) -> tuple[Metric, ...]:
    """The terms of a site's metric, damped and factored; the plain norm where there are no data."""
    terms = list(moments.terms.values()) if moments is not None else []
    if not terms:
        return (Metric(1.0, None, None),)
    scale = 0.5 if metric == "loss" else 1.0
    return tuple(
        Metric(scale, *(_root(moment, k, site, term) for k, moment in enumerate(term.sides)))
        for term in terms
    )


def shrinkage(moment: Tensor, samples: int) -> float:
    """How much of a second moment (N, N) estimated from so many rows gives way to its mean.

    With S = (1 − s) · moment + s · tr(moment) / N · I, the s that brings S closest to the true
    moment of Gaussian rows, in the Frobenius norm: oracle approximating shrinkage (Chen, Wiesel,
    Eldar & Hero 2010). Near 0 for many rows, 1 where they say nothing of the directions.
    """
    width = len(moment)
    trace = float(moment.diagonal().sum())
    square = float(moment.square().sum())
    spread = (samples + 1 - 2 / width) * (square - trace**2 / width)
    return min(1.0, ((1 - 2 / width) * square + trace**2) / spread) if spread > 0 else 1.0


def shrinkage_of_noise(moment: Tensor, noise: float) -> float:
    """The same, of a mean of matrices: ``noise`` is its relative variance (Ledoit & Wolf 2004)."""
    trace, square = float(moment.diagonal().sum()), float(moment.square().sum())
    spread = 1 - trace**2 / (len(moment) * square)
    return min(1.0, noise / spread) if spread > 0 else 1.0


def shrink(moment: Tensor, share: float, mean: float) -> Tensor:
    """A new moment: shrunk by a share, and damped, towards a mean eigenvalue."""
    result = moment * (1 - share)
    result.diagonal().add_((share + DAMPING) * mean)
    return result


def _root(moment: Tensor | None, side: int, site: Site, term: Term) -> Tensor | None:
    """L with L Lᵀ = the moment shrunk and damped, in float32; the square root of a diagonal.

    ``side`` says which of the term's two sides the moment is.
    """
    if moment is None:
        return None
    moment = moment.double()
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.full_like(diagonal, 1e-12).float()
    if moment.dim() == 1 and math.isfinite(mean):
        share = min(max(term.unseen, _DIAGONAL_DAMPING), 0.5)
        return (moment + share / (1 - share) * mean).sqrt().float()
    if not torch.isfinite(moment).all():
        raise ModelError(
            "the second moment of its inputs or gradients is not finite",
            site=site.name,
            way_out="check the calibration data for huge or non-finite values",
        )
    if term.noise is None:
        given = shrinkage(moment, term.samples[side])
    else:
        given = shrinkage_of_noise(moment, term.noise[side])
    factor, info = torch.linalg.cholesky_ex(shrink(moment, given, mean))
    if int(info) == 0:
        return factor.float().contiguous()  # as it is once it was kept on disk
    raise AnalysisError(
        "the second moment of its inputs or gradients is not positive semi-definite",
        site=site.name,
        way_out="check the calibration data for huge values",
    )


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
    root = root.double()
    return root.square() if root.dim() == 1 else root @ root.t()


def _mean(moment: Tensor | None) -> float:
    if moment is None:
        return 1.0
    return float(moment.mean() if moment.dim() == 1 else moment.diagonal().mean())


def _averaged(moments: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """The root of Σ share · moment / mean; full where one of them is."""
    known = [moment for moment in moments if moment is not None]
    if not known:
        return None
    full = [moment for moment in known if moment.dim() == 2]
    total = torch.zeros_like(full[0] if full else known[0])
    diagonal = total.diagonal() if full else total
    for moment, share in zip(moments, shares, strict=True):
        if moment is None:
            diagonal.add_(share)
        elif moment.dim() == 2:
            total.add_(moment, alpha=share / _mean(moment))
        else:
            diagonal.add_(moment, alpha=share / _mean(moment))
    return (torch.linalg.cholesky(total) if full else total.sqrt()).float()
