"""The dense matrix that cores stand for: the oracle of everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tensorize.ir.spec import TTSpec


def reconstruct(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
    """The dense weight that the cores stand for.

    The cores are contracted one after the other, and the axes are put in order by one permute at
    the end. Low rank needs none: it is the plain product ``U @ V``.

    Args:
        spec: the factorization.
        cores: one tensor a core, of the shapes ``spec.core_shapes``.

    Returns:
        A tensor of (m, n), or (experts, m, n), in the dtype and on the device of the cores. It is
        differentiable with respect to them.

    Raises:
        ValueError: number or shapes of the cores are not those of the spec.
    """
    check_cores(spec, cores)
    weight, names = cores[0], spec.cores[0]
    for k in range(1, len(cores)):
        needed = {*spec.batch, *spec.rows, *spec.columns}.union(*spec.cores[k + 1 :])
        weight, names = _contract(spec, weight, names, cores[k], spec.cores[k], needed)
    order = (*spec.batch, *spec.rows, *spec.columns)
    return _permute(weight, names, order).reshape(spec.shape)


def _contract(
    spec: TTSpec,
    left: Tensor,
    left_names: tuple[str, ...],
    right: Tensor,
    right_names: tuple[str, ...],
    needed: set[str],
) -> tuple[Tensor, tuple[str, ...]]:
    """One pairwise contraction as a (batched) matmul; shared indices in ``needed`` are kept."""
    shared = [name for name in left_names if name in right_names]
    batch = [name for name in shared if name in needed]
    summed = [name for name in shared if name not in needed]
    left_free = [name for name in left_names if name not in shared]
    right_free = [name for name in right_names if name not in shared]

    def size(names: Sequence[str]) -> int:
        return math.prod([spec.size[name] for name in names])  # dynamo takes no generator

    lead = [size(batch)] if batch else []
    left = _permute(left, left_names, (*batch, *left_free, *summed))
    right = _permute(right, right_names, (*batch, *summed, *right_free))
    product = left.reshape(*lead, size(left_free), size(summed)) @ right.reshape(
        *lead, size(summed), size(right_free)
    )
    names = (*batch, *left_free, *right_free)
    return product.reshape([spec.size[name] for name in names]), names


def _permute(tensor: Tensor, names: tuple[str, ...], order: tuple[str, ...]) -> Tensor:
    if names == order:
        return tensor
    return tensor.permute([names.index(name) for name in order])


def check_cores(spec: TTSpec, cores: Sequence[Tensor]) -> None:
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != spec.core_shapes:
        raise ValueError(f"{spec} has cores of shapes {spec.core_shapes}, got {shapes}")
