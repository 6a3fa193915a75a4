"""Two factors rounded one after the other, however that is done.

An error of V counts as U sees it, ΔW = U ΔV, so V is rounded in that metric. U is then the best for
what V has become, and is rounded as V sees an error of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.algebra.pivot import columns, whole

_TINY = 1e-6
"""What a matrix of products lacks to be surely positive, in its mean."""

_T = TypeVar("_T")


def rounded_pair(
    left: Tensor,
    right: Tensor,
    order: Tensor | None,
    metric: Metric,
    rounded: Callable[[Tensor, Metric], _T],
    values: Callable[[_T], Tensor],
) -> tuple[_T, _T]:
    """What ``rounded`` gives of both; ``values`` are the numbers that it stands for.

    ``order``: that of the columns, where V has an identity that is not stored.
    """
    first, second = rounded_pairs((left,), right, order, (metric,), rounded, values)
    return first, second


def rounded_pairs(
    lefts: Sequence[Tensor],
    right: Tensor,
    order: Tensor | None,
    metrics: Sequence[Metric],
    rounded: Callable[[Tensor, Metric], _T],
    values: Callable[[_T], Tensor],
) -> list[_T]:
    """The same of several U, and of the V that they have in common, which comes last."""
    second = rounded(right, metric_of_second(lefts, order, metrics))
    made = _whole(values(second).to(right.dtype), order)
    found = []
    for left, metric in zip(lefts, metrics, strict=True):
        seen = times_root(made, metric.right)
        exact = left @ times_root(_whole(right, order), metric.right)
        root = _root_of(seen)
        best = torch.cholesky_solve((seen @ exact.mT).double(), root).mT.to(left.dtype)
        found.append(rounded(best, Metric(metric.scale, metric.left, root.to(left.dtype))))
    return [*found, second]


def metric_of_second(
    lefts: Sequence[Tensor], order: Tensor | None, metrics: Sequence[Metric]
) -> Metric:
    """How an error of what is stored of V counts, with all that read it."""
    pairs = zip(lefts, metrics, strict=True)
    return average([_of_second(left, order, metric) for left, metric in pairs])


def _of_second(left: Tensor, order: Tensor | None, metric: Metric) -> Metric:
    across = metric.right
    if order is not None and across is not None:  # the other columns only
        others = across[columns(order, len(across))[left.shape[1] :].long()]
        across = others if others.dim() == 1 else _root_of(others).to(left.dtype)
    down = _root_of(root_times(metric.left, left).mT).to(left.dtype)
    return Metric(metric.scale, down, across)


def metric_of_first(right: Tensor, order: Tensor | None, metric: Metric) -> Metric:
    """How an error of U counts, with what is stored of V."""
    seen = times_root(_whole(right, order), metric.right)
    return Metric(metric.scale, metric.left, _root_of(seen).to(seen.dtype))


def _whole(right: Tensor, order: Tensor | None) -> Tensor:
    """V (R, N), with an identity that is not stored."""
    return right if order is None else whole(right, order)


def _root_of(factor: Tensor) -> Tensor:
    """The Cholesky factor of F Fᵀ, in float64."""
    gram = (factor @ factor.mT).double()
    gram.diagonal().add_(_share(gram))
    return torch.linalg.cholesky(gram)


def _share(gram: Tensor) -> Tensor:
    """What is added to a matrix of products; one, nearly, where a factor was rounded to nothing."""
    return (_TINY * gram.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
