"""A weight's cores at other ranks, and with them what an optimizer keeps of their gradients.

Cores that store all of themselves are cut and grow as ``bonds`` says. Low rank that stores no
identity is W = U' [I | V'] = U' V:

**Cut.** V becomes S V, of which other columns may be the identity then: with the basis B in these
columns U'' = U' (T B), and V'' are the other columns of B⁻¹ S V. For the gradient G of W, that by
U' is G Vᵀ, and by all of V it would be U'ᵀ G: it changes as V does, by (T B)ᵀ, and that by U' by
(B⁻¹ S)ᵀ. Of U'ᵀ G the columns that are kept are not known as such, but as U'ᵀ (G Vᵀ) = (U'ᵀ G) Vᵀ
they are U'ᵀ g_U - g_V V'ᵀ: gradients, and so momenta, are carried exactly. Squares change by the
squares of the same matrices, as if entries were independent of each other; of the columns that were
kept they are taken to be the mean of the others' in their row, which is a guess.

**Growth.** Some of the other columns are kept as well: U' V' in these is written out beside U', and
V' has rows of zeros for them. That is the very same product, and every new entry learns at once.
What was kept of gradients stays, where the entries stay; of new ones nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorize.algebra.pivot import columns
from tensorize.ir.spec import TTSpec
from tensorize.training.bonds import Bond, with_ranks
from tensorize.weight.lazy import FactoredWeight


class Change(Protocol):
    """Cores at other ranks, indices after them."""

    @property
    def cores(self) -> Sequence[Tensor]:
        """What is stored now."""
        ...

    def states(self, kept: Sequence[Tensor], *, squared: bool) -> list[Tensor]:
        """What is kept of the gradients of the cores before, as of those of the cores now."""
        ...


def change(
    weight: FactoredWeight, found: Sequence[Bond], spec: TTSpec, generator: torch.Generator
) -> Change:
    """What becomes of a weight at the ranks of ``spec``.

    Args:
        found: the bonds of its plain cores.
        generator: draws the directions, or the columns, that it grows by.
    """
    if not weight.spec.pivoted:
        return _Whole(weight, found, spec, generator)
    if spec.ranks[0] < weight.spec.ranks[0]:
        return _Cut(weight, found[0], spec)
    return _Growth(weight, spec, generator)


class _Whole:
    """Cores of which all is stored."""

    def __init__(
        self,
        weight: FactoredWeight,
        found: Sequence[Bond],
        spec: TTSpec,
        generator: torch.Generator,
    ) -> None:
        self._spec, self._found, self._ranks = weight.spec, found, spec.ranks
        before = [core.detach() for core in weight.cores]
        self.cores = with_ranks(weight.spec, before, found, spec.ranks)
        self._grow(spec, generator)

    def _grow(self, spec: TTSpec, generator: torch.Generator) -> None:
        """Random values in the right core of each bond that grew; zeros stay in the left one."""
        for k, (before, after) in enumerate(zip(self._spec.ranks, spec.ranks, strict=True)):
            if after <= before:
                continue
            core = self.cores[k + 1]
            new = core.narrow(spec.cores[k + 1].index(f"r{k + 1}"), before, after - before)
            size = core.double().square().sum().div(core.numel() * before / after).sqrt()
            values = torch.randn(new.shape, generator=generator, dtype=torch.float64)
            new.copy_((values * size.cpu()).to(new))

    def states(self, kept: Sequence[Tensor], *, squared: bool) -> list[Tensor]:
        how = self._spec, kept, self._found, self._ranks
        moved = with_ranks(*how, gradients=True, squared=squared)
        if squared:
            # A new direction begins with the mean of the others: with zero its first step is large.
            for k, (value, before) in enumerate(zip(moved, kept, strict=True)):
                if value.numel() > before.numel():
                    moved[k] = torch.where(value == 0, before.mean(), value)
        return moved


@dataclass(frozen=True)
class _Pivots:
    """U' (…, M, R) and V' (…, R, N - R) in float64, and the order of the columns (…, N)."""

    left: Tensor
    rest: Tensor
    order: Tensor

    @classmethod
    def of(cls, weight: FactoredWeight) -> _Pivots:
        left, rest = (core.detach().double() for core in weight.cores)
        return cls(left, rest, columns(weight.indices[0], weight.spec.shape[-1]))

    @property
    def rank(self) -> int:
        return self.rest.shape[-2]


class _Cut:
    """A smaller rank of low rank that stores no identity."""

    def __init__(self, weight: FactoredWeight, bond: Bond, spec: TTSpec) -> None:
        (rank,) = spec.ranks
        plain = [core.detach().double() for core in weight.plain_cores]
        left, right = with_ranks(weight.spec.plain, plain, [bond], spec.ranks)
        made = weight.format.stored(spec, (left, right), weight.dtype)
        self.cores = tuple(core.contiguous() for core in made)
        kept, self._others = _parts(columns(made[2], spec.shape[-1]), rank)
        basis = _columns(right, kept)
        self._before = _Pivots.of(weight)
        self._forth = bond.left[..., :rank] @ basis
        self._back = torch.linalg.solve(basis, bond.right[..., :rank, :])

    def states(self, kept: Sequence[Tensor], *, squared: bool) -> list[Tensor]:
        left, rest = (value.double() for value in kept)
        forth, back = self._forth, self._back
        if squared:
            forth, back = forth.square(), back.square()
        whole = _columns(self._by_all_columns(left, rest, squared), self._others)
        moved = left @ back.mT, forth.mT @ whole
        return [new.to(old.dtype).contiguous() for new, old in zip(moved, kept, strict=True)]

    def _by_all_columns(self, left: Tensor, rest: Tensor, squared: bool) -> Tensor:
        """What there would be of gradients by V, (…, R, N), of what there is by U' and V'."""
        before = self._before
        if not squared:
            hidden = before.left.mT @ left - rest @ before.rest.mT
        elif rest.shape[-1]:
            hidden = rest.mean(-1, keepdim=True).expand(*rest.shape[:-1], before.rank)
        else:  # every column is kept, and U' is W
            hidden = before.left.square().mT @ left
        return _columns(torch.cat([hidden, rest], -1), before.order.argsort(-1))


class _Growth:
    """A larger rank of low rank that stores no identity."""

    def __init__(self, weight: FactoredWeight, spec: TTSpec, generator: torch.Generator) -> None:
        before = _Pivots.of(weight)
        kept, others = _parts(before.order, before.rank)
        self._more = spec.ranks[0] - before.rank
        drawn = torch.rand(others.shape, generator=generator).argsort(-1).to(others.device)
        new, self._stays = (part.sort(-1).values for part in _parts(drawn, self._more))
        more = torch.cat([kept, others.gather(-1, new)], -1)
        self._place = more.argsort(-1)  # those that are kept ascend
        written = before.left @ _columns(before.rest, new)
        cores = self._placed(torch.cat([before.left, written], -1), before.rest, 0.0)
        order = [more.gather(-1, self._place), others.gather(-1, self._stays)]
        self.cores = (*(core.to(weight.dtype) for core in cores), torch.cat(order, -1))

    def _placed(self, left: Tensor, rest: Tensor, value: float | Tensor) -> tuple[Tensor, Tensor]:
        """The columns of U' in their place; of V' those that stay, and a value in new rows."""
        stays = _columns(rest, self._stays)
        rows = stays.new_zeros(*stays.shape[:-2], self._more, stays.shape[-1]) + value
        placed = torch.cat([stays, rows], -2).mT
        return _columns(left, self._place), _columns(placed, self._place).mT.contiguous()

    def states(self, kept: Sequence[Tensor], *, squared: bool) -> list[Tensor]:
        left, rest = kept
        # As where all is stored: squares begin with the mean of the others.
        means = [value.mean() if squared else 0.0 for value in kept]
        new = left.new_zeros(*left.shape[:-1], self._more) + means[0]
        return list(self._placed(torch.cat([left, new], -1), rest, means[1]))


def _parts(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first so many, and the others."""
    return order[..., :count], order[..., count:]


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns (…, K) of a matrix (…, R, N): (…, R, K)."""
    return torch.take_along_dim(matrix, order.long().unsqueeze(-2), -1)
