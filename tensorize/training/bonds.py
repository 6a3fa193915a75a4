"""The spectra of a factorization, from its cores alone, and cores of other ranks.

A bond is a rank index between two cores: W = L R with the cores left of it in L and those right of
it in R. The squared singular values of W's unfolding there are the eigenvalues of (Lᵀ L)(R Rᵀ), two
small matrices. Where the cores share other indices as well (blocks, experts), there is one such
pair for each of their values.

Cut at a bond, L T and S R with S T = I are the best approximation of the rank, both of equal norm
in every component (as in balanced truncation, Moore 1981). Cutting several bonds at once is
quasi-optimal as TT rounding is. A gradient by L T is that by L times Sᵀ, so what an optimizer keeps
of gradients goes along. With a function between two factors T can only be a permutation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.algebra.identities import times_at
from tensorize.ir.spec import TTSpec


@dataclass(frozen=True)
class Bond:
    """One rank index: ``squares`` (rank) summed over shared indices, descending; T and S.

    ``left`` is T (*shared, rank, rank) and ``right`` S (*shared, rank, rank); their first columns
    and rows are what a cut keeps. ``shared`` are the names of the indices in front.
    """

    name: str
    shared: tuple[str, ...]
    squares: Tensor
    left: Tensor
    right: Tensor


def bonds(spec: TTSpec, cores: Sequence[Tensor]) -> list[Bond]:
    """Every bond of a factorization, in float64."""
    exact = [core.detach().double() for core in cores]
    found = []
    for k in range(len(cores) - 1):
        (name,) = (axis for axis in spec.cores[k] if axis == f"r{k + 1}")
        shared = tuple(
            axis
            for axis in spec.size
            if axis != name
            and any(axis in c for c in spec.cores[: k + 1])
            and any(axis in c for c in spec.cores[k + 1 :])
        )
        left = _gram(spec.cores[: k + 1], exact[: k + 1], name, shared)
        right = _gram(spec.cores[k + 1 :][::-1], exact[k + 1 :][::-1], name, shared)
        found.append(_balanced(name, shared, left, right))
    return found


def components(spec: TTSpec, cores: Sequence[Tensor]) -> list[Bond]:
    """The bond of two factors with a function of each entry between them, in float64.

    Only the order of the components may change there, so a cut keeps the largest: of a component
    the squared norm of its column times that of its row.
    """
    left, right = (core.detach().double() for core in cores)
    squares, order = (left.square().sum(0) * right.square().sum(1)).sort(descending=True)
    turn = torch.eye(len(order), dtype=torch.float64, device=left.device)[:, order]
    return [Bond("r1", (), squares, turn, turn.mT)]


def _gram(
    names: Sequence[tuple[str, ...]], cores: Sequence[Tensor], bond: str, shared: tuple[str, ...]
) -> Tensor:
    """Σ of the products of one side's entries with themselves: (*shared, rank, rank)."""
    inner = {axis for axes in names for axis in axes if axis.startswith("r")}
    letters: dict[str, int] = {}

    def number(axis: str, twin: bool) -> int:
        return letters.setdefault(f"{axis}'" if twin and axis in inner else axis, len(letters))

    operands: list[object] = []
    for axes, core in zip(names, cores, strict=True):
        for twin in (False, True):
            operands += [core, [number(axis, twin) for axis in axes]]
    out = [letters[axis] for axis in shared] + [letters[bond], letters[f"{bond}'"]]
    return torch.einsum(*operands, out)


def _balanced(name: str, shared: tuple[str, ...], left: Tensor, right: Tensor) -> Bond:
    """T and S from Lᵀ L and R Rᵀ: with Lᵀ L = E Λ Eᵀ, the eigenvectors Q of Λ^½ Eᵀ R Rᵀ E Λ^½."""
    values, vectors = torch.linalg.eigh(left)
    # A direction of L below rounding has no inverse; it is the last one to be kept.
    floor = values[..., -1:].clamp_min(1e-300) * 1e-14
    root = values.clamp_min(floor).sqrt()
    half = vectors * root.unsqueeze(-2)
    squares, turn = torch.linalg.eigh(half.mT @ right @ half)
    squares, turn = squares.flip(-1), turn.flip(-1)
    smallest = squares[..., :1].clamp_min(1e-300) * 1e-14
    sigma = squares.clamp_min(smallest).sqrt()
    inverse = vectors / root.unsqueeze(-2)
    to_left = inverse @ turn * sigma.sqrt().unsqueeze(-2)
    to_right = (half @ turn / sigma.sqrt().unsqueeze(-2)).mT
    total = squares.clamp_min(0).reshape(-1, squares.shape[-1]).sum(0)
    return Bond(name, shared, total, to_left, to_right)


def with_ranks(
    spec: TTSpec,
    tensors: Sequence[Tensor],
    found: Sequence[Bond],
    ranks: Sequence[int],
    *,
    gradients: bool = False,
    squared: bool = False,
) -> list[Tensor]:
    """Cores at other ranks: cut where smaller, and where larger filled up with zeros.

    Args:
        tensors: the cores, or what is kept of their gradients.
        found: the bonds of the cores.
        ranks: new inner ranks.
        gradients: the tensors are of gradients, which change as the inverse does.
        squared: they are squares of gradients; independent of each other, their means change as
            the squares of the inverse.
    """
    result = [tensor.double() for tensor in tensors]
    for k, (bond, rank) in enumerate(zip(found, ranks, strict=True)):
        now = len(bond.squares)
        if rank < now:
            to_left = bond.right.mT if gradients else bond.left
            to_right = bond.left.mT if gradients else bond.right
            to_left, to_right = to_left[..., :rank], to_right[..., :rank, :]
            if squared:
                to_left, to_right = to_left.square(), to_right.square()
            result[k] = times_at(result[k], spec.cores[k], bond.name, bond.shared, to_left)
            how = spec.cores[k + 1], bond.name, bond.shared
            result[k + 1] = times_at(result[k + 1], *how, to_right.mT)
        elif rank > now:
            for j in (k, k + 1):
                axis = spec.cores[j].index(bond.name)
                shape = list(result[j].shape)
                shape[axis] = rank - now
                result[j] = torch.cat([result[j], result[j].new_zeros(shape)], axis)
    # Contiguous, as they are when they are read again: the layout decides how a matmul rounds.
    return [new.to(old.dtype).contiguous() for new, old in zip(result, tensors, strict=True)]


def extended(squares: Tensor, length: int) -> Tensor:
    """Squares that might follow, were the rank larger: the power law of the second half of them."""
    now = len(squares)
    if length <= now or now < 2:
        return squares[:length] if length <= now else squares.expand(length).clone()
    middle = max(1, now // 2)
    last = float(squares[-1].clamp_min(1e-300))
    slope = math.log(float(squares[middle - 1].clamp_min(1e-300)) / last) / math.log(now / middle)
    beyond = torch.arange(now + 1, length + 1, dtype=squares.dtype)
    return torch.cat([squares, last * (beyond / now) ** -max(slope, 0.0)])
