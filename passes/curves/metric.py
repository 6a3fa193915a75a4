"""The metric of a site, from its second moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.base.errors import AnalysisError, ModelError
from tensorize.base.tensors import doubled, singled, squared
from tensorize.ir.sites import Site
from tensorize.passes.observe.moments import Moments, Term

# What is added to the diagonal of a second moment, however many rows it is of: a share of itself,
# and of its mean, as what was hardly ever active may be elsewhere.
DAMPING, LEAST = 0.02, 0.01
_TINY = 1e-12
"""The least mean of a matrix's moment, relative to the mean of those of a whole stack."""

# Of a diagonal: the least share of it that is spread evenly.
_DIAGONAL_DAMPING = 0.05 / 1.05


def site_metrics(site: Site, moments: Moments | None, metric: str) -> tuple[Metric, ...]:
    """The terms of a site's metric, damped and factored; the plain norm where there are no data."""
    terms = list(moments.terms.values()) if moments is not None else []
    if not terms:
        return (Metric(1.0, None, None),)
    scale = 0.5 if metric == "loss" else 1.0
    if metric == "loss" and site.reals > 1:
        scale /= 2  # E[Re(gᴴ ΔW x)²] is half of E|gᴴ ΔW x|², as no phase is like another
    return tuple(
        Metric(
            scale, *(_root(moment, k, site, term) for k, moment in enumerate(term.sides))
        ).packed()
        for term in terms
    )


def shrinkage(moment: Tensor, samples: int) -> float:
    """How much of a second moment (N, N) estimated from so many rows gives way to its diagonal.

    In units of its diagonal d, in which R = D^-½ moment D^-½ has a trace of N, that is the s that
    brings (1 − s) R + s I closest to the truth for Gaussian rows, in the Frobenius norm: oracle
    approximating shrinkage (Chen, Wiesel, Eldar & Hero 2010). Near 0 for many rows, 1 where they
    say nothing of the directions. A few inputs are often hundreds of times as large as the others:
    without these units they alone would say how much noise there is, and in which directions.
    """
    width, diagonal = len(moment), moment.diagonal().real
    sizes = diagonal + LEAST * diagonal.mean()
    square = float((squared(moment) / sizes / sizes.unsqueeze(-1)).sum())
    spread = (samples + 1 - 2 / width) * (square - width)
    return min(1.0, ((1 - 2 / width) * square + width**2) / spread) if spread > 0 else 1.0


def shrinkage_of_noise(moment: Tensor, noise: float) -> float:
    """The same, of a mean of matrices: ``noise`` is its relative variance (Ledoit & Wolf 2004)."""
    diagonal = float(moment.diagonal().real.square().sum())
    spread = 1 - diagonal / float(squared(moment).sum())
    return min(1.0, noise / spread) if spread > 0 else 1.0


def damped(moment: Tensor, share: float, damping: float = DAMPING) -> Tensor:
    """A new moment (N, N): of this one a share gives way to its diagonal, and more is added."""
    diagonal = moment.diagonal()
    result = moment * (1 - share)
    result.diagonal().add_((share + damping) * diagonal + LEAST * diagonal.mean())
    return result


def _reached(moment: Tensor, whole: float) -> bool:
    """Whether a moment of one of several matrices is more than rounding of the others'."""
    return float(moment.diagonal().real.mean()) > _TINY * whole


def _root(moment: Tensor | None, side: int, site: Site, term: Term) -> Tensor | None:
    """L with L Lᵀ = the moment shrunk and damped, in float32; the square root of a diagonal.

    ``side`` says which of the term's two sides the moment is.
    """
    if moment is None:
        return None
    moment = doubled(moment)
    if moment.dim() == 3:  # of a mode that nothing reaches, the least there is
        whole = float(moment.diagonal(dim1=-2, dim2=-1).real.mean())
        least = max(_TINY * whole, _TINY**2) * torch.eye(moment.shape[-1], dtype=moment.dtype)
        roots = [_root(m if _reached(m, whole) else least, side, site, term) for m in moment]
        return torch.stack([root for root in roots if root is not None])
    diagonal = moment if moment.dim() == 1 else moment.diagonal().real
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
        given = shrinkage(moment, term.samples[side] // (site.experts if site.apart else 1))
    else:
        given = shrinkage_of_noise(moment, term.noise[side])
    factor, info = torch.linalg.cholesky_ex(damped(moment, given))
    if int(info) == 0:
        return singled(factor).contiguous()  # as it is once it was kept on disk
    raise AnalysisError(
        "the second moment of its inputs or gradients is not positive semi-definite",
        site=site.name,
        way_out="check the calibration data for huge values",
    )
