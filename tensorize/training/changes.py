"""A weight's cores at other ranks, and with them what an optimizer keeps of their gradients.

Cores that store all of themselves are cut and grow as ``bonds`` says. Those that store no identity
are W = U' [I | V'] = U' V at every bond, U' being the core before it and V the one behind:

**Cut.** V becomes S V, of which other columns may be the identity then: with the basis B in these
columns U'' = U' (T B), and V'' are the other columns of B⁻¹ S V. For the gradient G of W, that by
U' is G Vᵀ, and by all of V it would be U'ᵀ G: it changes as V does, by (T B)ᵀ, and that by U' by
(B⁻¹ S)ᵀ. Of U'ᵀ G the columns that are kept are not known as such, but as U'ᵀ (G Vᵀ) = (U'ᵀ G) Vᵀ
they are U'ᵀ g_U - g_V V'ᵀ, from the first bond to the last: gradients, and so momenta, are carried
exactly. Squares change by the squares of the same matrices, as if entries were independent of each
other; of the columns that were kept they are taken to be the mean of the others' in their row,
which is a guess. Trains and blocks grow in the same way, as those that store all do.

**Growth** of low rank. Some of the other columns are kept as well: U' V' in these is written out
beside U', and V' has rows of zeros for them. That is the very same product, and every new entry
learns at once. What was kept of gradients stays, where the entries stay; of new ones nothing is
known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorize.algebra.identities import as_matrices, lead, met, orders, times, times_at
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
    if weight.format.planned or spec.ranks[0] < weight.spec.ranks[0]:
        return _InOtherBases(weight, found, spec, generator)
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


class _InOtherBases:
    """Other ranks of what stores no identity: whole for a moment, and without new identities."""

    def __init__(
        self,
        weight: FactoredWeight,
        found: Sequence[Bond],
        spec: TTSpec,
        generator: torch.Generator,
    ) -> None:
        self._spec, self._orders = weight.spec, orders(weight.spec, weight.indices)
        self._before = [core.detach().double() for core in weight.plain_cores]
        whole = FactoredWeight(weight.spec.plain, tuple(self._before), weight.frame)
        moved = _Whole(whole, found, spec.plain, generator).cores
        made = weight.format.stored(spec, moved, weight.dtype)
        self.cores = tuple(core.contiguous() for core in made)
        self._now, self._orders_now = spec, orders(spec, made[len(spec.core_shapes) :])
        # T and S of each bond, with the change of basis after them.
        self._changes: list[tuple[Tensor, Tensor]] = []
        for k in range(len(spec.ranks), 0, -1):
            left, right = _cut(found[k - 1], spec, k)
            kept, _ = _parts(self._orders_now[k - 1], spec.ranks[k - 1])
            basis = _columns(as_matrices(spec, k, moved[k]), kept)
            back = torch.linalg.solve(basis, right.expand(*basis.shape[:-1], -1))
            self._changes.insert(0, (left @ basis, back))
            moved[k - 1] = times(spec, k, moved[k - 1], basis)

    def states(self, kept: Sequence[Tensor], *, squared: bool) -> list[Tensor]:
        whole, spec = self._by_all(kept, squared), self._now
        for k, (forth, back) in enumerate(self._changes, 1):
            if squared:
                forth, back = forth.square(), back.square()
            whole[k - 1] = times(spec, k, whole[k - 1], back.mT)
            whole[k] = times_at(whole[k], spec.cores[k], f"r{k}", lead(spec, k), forth)
        for k, order in enumerate(self._orders_now, 1):
            _, others = _parts(order, spec.ranks[k - 1])
            whole[k] = _columns(as_matrices(spec, k, whole[k]), others)
        return [new.to(old.dtype).contiguous() for new, old in zip(whole, kept, strict=True)]

    def _by_all(self, kept: Sequence[Tensor], squared: bool) -> list[Tensor]:
        """What there would be of gradients by plain cores, of what there is by those stored."""
        spec, found = self._spec, [value.double() for value in kept]
        for k, order in enumerate(self._orders, 1):
            core, rest, rank = self._before[k - 1], found[k], spec.ranks[k - 1]
            if not squared:
                _, others = _parts(order, rank)
                stored = _columns(as_matrices(spec, k, self._before[k]), others)
                hidden = met(spec, k, core, found[k - 1]) - rest @ stored.mT
            elif rest.shape[-1]:
                hidden = rest.mean(-1, keepdim=True).expand(*rest.shape[:-1], rank)
            else:  # every column is kept
                hidden = met(spec, k, core.square(), found[k - 1])
            together = _columns(torch.cat([hidden, rest], -1), order.argsort(-1))
            found[k] = together.reshape(spec.whole_shapes[k])
        return found


def _cut(bond: Bond, spec: TTSpec, k: int) -> tuple[Tensor, Tensor]:
    """T and S of a bond at the rank of a spec; where it grows, nothing but more zeros."""
    now, rank = len(bond.squares), spec.ranks[k - 1]
    if rank >= now:
        left = torch.eye(now, rank).to(bond.left)
        return left, left.mT
    places = [bond.shared.index(axis) for axis in lead(spec, k)]
    left, right = (matrix.permute(*places, -2, -1) for matrix in (bond.left, bond.right))
    return left[..., :rank], right[..., :rank, :]


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
