"""Steps for every row and column of a matrix that lose the same for every entry in a metric.

Entries that are rounded one after the other lose Σ step_ij² D_R,i D_K,j / 12 (``quantise``). At a
given number of bits the sum is least where all terms are the same θ: step_ij = √(12 θ / (D_R,i
D_K,j)), a factor for every row times one for every column. Where a step is larger than what is to
be rounded, nothing is left of it, and that is what is lost: reverse water-filling (Shannon 1959).

Factors are kept as whole quarters of an octave, in which they say little and are the same bits
everywhere; a step that is off by an eighth costs less than a hundredth of a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.algebra.quantise import codes_of_steps, damped, side_pivots, unit

MOST = 2**15 - 129
"""The largest code."""

_WIDEST = 400
"""Quarter octaves up or down: beyond, products of two factors are no float32 any more."""

_ROUNDS = 3
"""How often what is lost is estimated anew from what the others lose."""

_QUARTERS = (1.0, 1.189207077026367, 1.4142135381698608, 1.6817928552627563)


def powers(exponents: Tensor) -> Tensor:
    """2^(e / 4), in float32: the same bits on every machine."""
    roots = torch.tensor(_QUARTERS)[exponents.long() % 4]
    return torch.ldexp(roots, exponents.div(4, rounding_mode="floor"))


@dataclass(frozen=True)
class Steps:
    """The exponents of a matrix's rows (M,) and columns (N,), as int16."""

    down: Tensor
    across: Tensor

    @property
    def each(self) -> Tensor:
        """The step of every entry (M, N)."""
        return powers(self.down)[:, None] * powers(self.across)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes (M, N) stand for, each product rounded once to float32."""
        found = codes.float()
        return found.mul_(powers(self.down)[:, None]).mul_(powers(self.across))


@dataclass(frozen=True)
class Expected:
    """What coding a matrix at some θ is expected to give: codes like those, and what they lose."""

    steps: Steps
    codes: Tensor
    lost: float


@dataclass(frozen=True, eq=False)
class Filled:
    """A matrix (M, N) that is to be coded in a metric."""

    matrix: Tensor
    metric: Metric

    @cached_property
    def _roots(self) -> tuple[Tensor | None, Tensor | None]:
        work = self.matrix.float()
        return damped(self.metric.left, work), damped(self.metric.right, work)

    @cached_property
    def _pivots(self) -> tuple[Tensor, Tensor]:
        sides = zip(self._roots, self.matrix.shape, strict=True)
        down, across = (side_pivots(root, size, self.matrix) for root, size in sides)
        return down, across

    def steps(self, theta: float) -> Steps:
        """Those with which every entry loses θ; in rows whose codes would be too large, more."""
        down, across = self._pivots
        found = Steps(_exponents(12 * theta / self.metric.scale / down), _exponents(1 / across))
        largest = (self.matrix.double().abs() / powers(found.across)).amax(1) / powers(found.down)
        more = (4 * (largest * (2 / MOST)).clamp_min(1).log2()).ceil()
        down = (found.down + more).clamp_max(_WIDEST).to(torch.int16)
        return Steps(down, found.across)

    def codes(self, theta: float) -> tuple[Steps, Tensor]:
        """Codes (M, N) that lose little, with their steps."""
        steps = self.steps(theta)
        return steps, codes_of_steps(self.matrix, steps.each, MOST, *map(unit, self._roots))

    def expected(self, theta: float) -> Expected:
        """About what ``codes`` gives, without rounding one after the other.

        An entry aims at what it is less what the later ones lost. That is taken as noise, whose
        variance follows from theirs: ΔW = B⁻ᵀ η A⁻¹ with η the roundings, each by itself.
        """
        steps, target = self.steps(theta), self.matrix.float()
        each = steps.each
        lost = each.square() / 12
        left, right = self._spreads
        mixes = left is not None or right is not None
        codes = (target / each).round_()
        for _ in range(_ROUNDS if mixes else 1):
            aim = target
            if mixes:
                whole = lost if left is None else left @ lost
                whole = whole if right is None else whole @ right
                aim = (whole - lost).clamp_min_(0).sqrt_().mul_(self._noise).add_(target)
            aim = aim / each
            codes = aim.round().clamp_(-MOST, MOST)
            lost = (aim - codes).square_().mul_(each.square())
        down, across = self._weights
        return Expected(
            steps, codes.int(), self.metric.scale * float(down @ lost.double() @ across)
        )

    @cached_property
    def _noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.matrix.shape, generator=generator)

    @cached_property
    def _inverses(self) -> tuple[Tensor | None, Tensor | None]:
        """B⁻¹ and A⁻¹."""
        units = map(unit, self._roots)
        left, right = (None if mixing is None else _inverse(mixing) for mixing in units)
        return left, right

    @cached_property
    def _spreads(self) -> tuple[Tensor | None, Tensor | None]:
        """Squares of B⁻ᵀ and of A⁻¹: how the variance of a rounding spreads."""
        left, right = self._inverses
        return None if left is None else left.mT.square(), None if right is None else right.square()

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """What the roundings η of rows and of columns count in the metric itself, which is not
        damped: the diagonals of B⁻¹ R B⁻ᵀ and A⁻¹ K A⁻ᵀ."""
        found = []
        sides = (self.metric.left, self.metric.right)
        for inverse, root, pivot in zip(self._inverses, sides, self._pivots, strict=True):
            if inverse is None or root is None:
                found.append(pivot)
            else:
                found.append((inverse.double() @ root.double()).square().sum(1))
        return found[0], found[1]


def _inverse(mixing: Tensor) -> Tensor:
    identity = torch.eye(len(mixing), device=mixing.device)
    return torch.linalg.solve_triangular(mixing, identity, upper=False, unitriangular=True)


def _exponents(squares: Tensor) -> Tensor:
    """Of the roots of squares, in quarter octaves."""
    tiny, huge = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).max
    quarters = (2 * squares.double().clamp(tiny, huge).log2()).round_()
    return quarters.clamp_(-_WIDEST, _WIDEST).to(torch.int16)
