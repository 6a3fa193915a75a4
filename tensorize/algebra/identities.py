"""Tensor trains and blocks without the numbers that a change of basis can remove.

At each bond W = L R, L being all cores before it and R all behind, and L R = (L B) (B⁻¹ R) for
every B. So each core but the first, read as a matrix whose rows are its bond, may be the identity
in some of its columns (``algebra.pivot``), from the last core to the second: B goes into the core
before. A bond of rank r then needs r² fewer numbers; where cores share indices, as the two of
blocks do, every value of these has a bond of its own. What is left of the first core are entries
of W, as in the interpolative trains of Oseledets and Tyrtyshnikov (2010).

Cores are small beside what they multiply: the identities are put back before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.algebra.pivot import columns, fitted, pivoted, placed
from tensorize.base.tensors import doubled
from tensorize.ir.spec import TTSpec


def without_identities(
    spec: TTSpec, cores: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What a ``pivoted`` spec stores of plain cores, in a dtype: its cores, and then the columns
    that are an identity, of every core but the first.

    What a core loses by rounding the one before it makes up for, as well as one can.
    """
    left = [doubled(core) for core in cores]
    rests: list[Tensor] = []
    kept: list[Tensor] = []
    for k in range(len(left) - 1, 0, -1):
        matrices = as_matrices(spec, k, left[k])
        each = [_without(one, dtype) for one in matrices.reshape(-1, *matrices.shape[-2:])]
        bases, rest, which = (torch.stack(parts) for parts in zip(*each, strict=True))
        rests.append(rest.reshape(spec.core_shapes[k]).contiguous())
        kept.append(which.reshape(spec.indices[k - 1].shape))
        bases = bases.reshape(*matrices.shape[:-1], -1)
        left[k - 1] = times(spec, k, left[k - 1], bases)
    return (left[0].to(dtype).contiguous(), *rests[::-1], *kept[::-1])


def _without(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """B (R, R), V' (R, N - R) and the columns kept of a matrix (R, N), about B [I | V']."""
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found = pivoted(one, matrix)
    rest = found.rest.to(dtype)
    return fitted(one, matrix, rest, found.order), rest, found.order[: len(matrix)]


def with_identities(spec: TTSpec, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The plain cores of what a ``pivoted`` spec stores; differentiably."""
    count = len(spec.core_shapes)
    made = [stored[0]]
    for k in range(1, count):
        rest, kept = stored[k], stored[count + k - 1]
        core = placed(rest, places(kept, sum(rest.shape[-2:])))
        made.append(core.reshape(spec.whole_shapes[k]))
    return tuple(made)


def places(kept: Tensor, n: int) -> Tensor:
    """Of each column (…, N) its place, those kept (…, R) being in front and all others behind."""
    mine = torch.zeros(*kept.shape[:-1], n, dtype=torch.int64, device=kept.device)
    mine = mine.scatter(-1, kept.long(), 1)
    before = mine.cumsum(-1)
    behind = kept.shape[-1] + torch.arange(n, device=kept.device) - before
    # What has no values yet keeps one column r times.
    return torch.where(mine > 0, before - 1, behind).clamp(max=n - 1)


def orders(spec: TTSpec, indices: Sequence[Tensor]) -> list[Tensor]:
    """Of every core but the first of a ``pivoted`` spec the order (…, columns) of its columns: the
    r_k that are an identity, then the others."""
    if spec.indices[0].name == "order":  # of low rank all are told
        return [columns(indices[0], spec.shape[-1])]
    return [places(kept, n).argsort(-1) for kept, n in zip(indices, spec.widths, strict=True)]


def as_matrices(spec: TTSpec, k: int, core: Tensor) -> Tensor:
    """Core k > 0 as matrices (…, r_k, columns), one for every value of what it shares with those
    before it."""
    before = len(lead(spec, k)) + 1
    return core.flatten(before) if core.dim() > before else core.unsqueeze(-1)


def lead(spec: TTSpec, k: int) -> tuple[str, ...]:
    """The axes that core k > 0 shares with those before it, its bond apart."""
    return spec.cores[k][: spec.cores[k].index(f"r{k}")]


def times(spec: TTSpec, k: int, core: Tensor, basis: Tensor) -> Tensor:
    """Core k - 1 with its bond to core k multiplied by a matrix (…, r_k, new)."""
    return times_at(core, spec.cores[k - 1], f"r{k}", lead(spec, k), basis)


def met(spec: TTSpec, k: int, one: Tensor, other: Tensor) -> Tensor:
    """Two of core k - 1 summed over all but the bond to core k: (…, r_k, r_k)."""
    axes = spec.cores[k - 1]
    numbers = {axis: number for number, axis in enumerate(axes)}
    bond, twin = numbers[f"r{k}"], len(axes)
    first = list(range(len(axes)))
    second = [twin if number == bond else number for number in first]
    return torch.einsum(one, first, other, second, [*map(numbers.get, lead(spec, k)), bond, twin])


def times_at(
    core: Tensor, axes: Sequence[str], bond: str, shared: Sequence[str], basis: Tensor
) -> Tensor:
    """A core of these axes with one of them multiplied by a matrix (*shared, old, new)."""
    numbers = {axis: k for k, axis in enumerate(axes)}
    new = len(axes)
    of_basis = [*(numbers[axis] for axis in shared), numbers[bond], new]
    out = [new if axis == bond else numbers[axis] for axis in axes]
    return torch.einsum(core, list(range(len(axes))), basis, of_basis, out)
