"""Alternating least squares in the metric, where no single SVD gives the best factors.

That is so for a tensor train, whose structure whitening destroys, and for a tied weight, whose
error is a sum of metrics. With all cores but one held, the error of a weight is quadratic in that
core: its normal equations are solved by conjugate gradients (Hestenes & Stiefel 1952) from where it
stands, so no step makes the error larger. TT-SVD, or the SVD in the averaged metric, is the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensorize.algebra.metric import Metric, root_times, times_root
from tensorize.base.tensors import squared
from tensorize.ir.spec import Spec

if TYPE_CHECKING:
    from tensorize.formats.format import Format

_SWEEPS, _STEPS = 3, 12


def improved(
    form: Format[Any],
    spec: Spec,
    cores: Sequence[Tensor],
    weight: Tensor,
    metrics: Sequence[Metric],
) -> tuple[Tensor, ...]:
    """Cores of the same spec, closer to ``weight`` (M, N) in the sum of the metrics."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    found = [core.to(dtype) for core in cores]
    pull = sum(m.scale * _moments_around(m, weight.to(dtype)) for m in metrics)
    assert isinstance(pull, Tensor)
    before = form.error(spec, found, weight, metrics)
    for _ in range(_SWEEPS):
        for k in range(len(found)):
            found[k] = _solved(form, spec, found, k, pull, metrics)
    if not form.error(spec, found, weight, metrics) < before:
        return tuple(cores)
    return tuple(core.to(old.dtype) for core, old in zip(found, cores, strict=True))


def _moments_around(metric: Metric, weight: Tensor) -> Tensor:
    """R W K: half the gradient of ‖L_Rᵀ W L_K‖²."""
    inner = times_root(root_times(metric.left, weight), metric.right)
    return _times_transposed(_root_from(metric.left, inner), metric.right)


def _root_from(root: Tensor | None, weight: Tensor) -> Tensor:
    """L W."""
    if root is None:
        return weight
    root = root.to(weight)
    return root.unsqueeze(-1) * weight if root.dim() == 1 else root @ weight


def _times_transposed(weight: Tensor, root: Tensor | None) -> Tensor:
    """W Lᵀ."""
    if root is None:
        return weight
    root = root.to(weight)
    return weight * root if root.dim() == 1 else weight @ root.mH


def _solved(
    form: Format[Any],
    spec: Spec,
    cores: Sequence[Tensor],
    k: int,
    pull: Tensor,
    metrics: Sequence[Metric],
) -> Tensor:
    """Core k after some steps of conjugate gradients on its normal equations A c = b."""

    def gradient(value: Callable[[list[Tensor]], Tensor], core: Tensor) -> Tensor:
        core = core.detach().requires_grad_()
        with torch.enable_grad():
            whole = [core if j == k else other for j, other in enumerate(cores)]
            return torch.autograd.grad(value(whole), core)[0]

    def energy(whole: list[Tensor]) -> Tensor:
        return form.energy(spec, whole, metrics)

    def product(whole: list[Tensor]) -> Tensor:
        return form.inner(spec, whole, pull)

    core = cores[k]
    residual = gradient(product, core) - gradient(energy, core) / 2
    direction, size = residual, squared(residual).sum()
    start = size
    for _ in range(_STEPS):
        if size <= 1e-12 * start or size == 0:
            break
        image = gradient(energy, direction) / 2
        curvature = (direction.conj() * image).sum().real
        if curvature <= 0:
            break
        step = size / curvature
        core = core + step * direction
        residual = residual - step * image
        following = squared(residual).sum()
        direction, size = residual + following / size * direction, following
    return core
