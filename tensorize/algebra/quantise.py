"""Entries of a few bits: which numbers codes stand for, and which codes lose least in a metric.

Code c of a group of columns stands for (c - zero) · scale. In the metric tr(R ΔW K ΔWᵀ), with
R = B D_R Bᵀ and K = A D_K Aᵀ (A, B lower triangular with a unit diagonal), the loss is
Σ D_R,i D_K,j η_ij² with η = Bᵀ ΔW A. From the last entry to the first, every entry is rounded after
what the later ones lost was taken off: then η is no more than a rounding, and the loss is
Σ step² D_R D_K / 12, which needs no rounding to be known.

Sources: Frantar et al., "GPTQ", ICLR 2023, and Chee et al., "QuIP", NeurIPS 2023, for one side;
Tseng et al., "YAQA", 2025, for both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.ir.precision import Precision

DAMPING = 0.1
"""What is added to a moment's diagonal, in its mean: few data do not show which directions are
small, and no error may be pushed there."""

_BLOCK = 32
"""Entries a side that are rounded one after the other, between products of matrices."""

_SHRINKS = tuple(1 - 0.05 * k for k in range(9))
"""The shares of a group's range that are tried: where few entries are cut off, the rest have a
finer step."""


@dataclass(frozen=True)
class Grid:
    """What codes of a matrix (M, N) can stand for: ``scale`` and ``zero`` are (M, groups)."""

    precision: Precision
    columns: int
    scale: Tensor
    zero: Tensor

    @property
    def steps(self) -> Tensor:
        """The scale of every entry: (M, N)."""
        return self._spread(self.scale)

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes (M, N), as bytes."""
        codes = (weight / self.steps).round_().add_(self._spread(self.zero))
        return codes.clamp_(*self.precision.codes).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return getattr(torch, self.precision.dtype)

    def values(self, codes: Tensor) -> Tensor:
        """The matrix that codes stand for."""
        return (codes.to(self.scale.dtype) - self._spread(self.zero)) * self.steps

    def _spread(self, each: Tensor) -> Tensor:
        group = self.precision.group or self.columns
        return each.repeat_interleave(group, -1)[:, : self.columns]


def grid(
    weight: Tensor, precision: Precision, metric: Metric, storage: torch.dtype | None = None
) -> Grid:
    """The scales and zero points that lose least where every entry is rounded by itself.

    ``storage``: the dtype that scales are kept in; they are rounded to it before any code is
    chosen.
    """
    m, n = weight.shape
    group, (least, most) = precision.group or n, precision.codes
    count = precision.groups(n)
    padding = count * group - n
    work = weight.float()
    groups = F.pad(work, (0, padding)).reshape(m, count, group)
    counts = F.pad(_diagonal(metric.right, n, work), (0, padding)).reshape(count, group)
    low, high = groups.amin(-1), groups.amax(-1)
    if precision.offset:
        low, high = low.clamp_max(0), high.clamp_min(0)
    else:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        step = (shrink * (high - low) / (most - least)).clamp_min(torch.finfo(torch.float32).tiny)
        if storage is not None:
            step = step.to(storage).float()
        if precision.offset:
            middle = (-shrink * low / step).round_().clamp_(least, most)
        else:
            middle = torch.full_like(step, precision.middle)
        codes = (groups / step[..., None]).round_().add_(middle[..., None]).clamp_(least, most)
        off = codes.sub_(middle[..., None]).mul_(step[..., None]).sub_(groups).square_()
        lost = (off * counts).sum(-1)
        better = lost < best
        best = torch.where(better, lost, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
    return Grid(precision, n, scale, zero)


def codes_for(weight: Tensor, found: Grid, metric: Metric) -> Tensor:
    """Codes (M, N) that lose little in a metric: each takes up what the others lose."""
    target = weight.float()
    roots = (damped(side, target) for side in (metric.left, metric.right))
    return _codes(target, _Rounding.of(found), *map(unit, roots))


def codes_of_steps(
    weight: Tensor, steps: Tensor, most: int, outputs: Tensor | None, inputs: Tensor | None
) -> Tensor:
    """The same for a step of every entry (M, N): whole numbers within ±most, as int32.

    ``outputs`` and ``inputs`` are the ``unit`` of both sides.
    """
    rounding = _Rounding(steps, torch.zeros_like(steps), (-most, most), torch.int32)
    return _codes(weight.float(), rounding, outputs, inputs)


def _codes(
    target: Tensor, rounding: _Rounding, outputs: Tensor | None, inputs: Tensor | None
) -> Tensor:
    if inputs is None and outputs is None:
        return rounding(target, (slice(None),))[0]
    if inputs is None:
        inputs = torch.eye(target.shape[1], device=target.device)
    if outputs is None:
        return _by_columns(target, rounding, inputs)
    return _by_entries(target, rounding, inputs, outputs)


def expected(steps: Tensor, scale: float, down: Tensor, across: Tensor) -> float:
    """What codes that were chosen so lose in a metric, without choosing them: Σ step² D_R D_K / 12.

    ``scale`` is the metric's, ``down`` and ``across`` are its ``pivots``.
    """
    return scale * float(expected_by_column(steps, down) @ across)


def expected_by_column(steps: Tensor, down: Tensor) -> Tensor:
    """What each column loses where its weight is one: Σ_i step_ij² D_R,i / 12, (N,)."""
    return down @ steps.double().square() / 12


def pivots(metric: Metric, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """D_R (M,) and D_K (N,) for a matrix (M, N): the same for every number of bits."""
    sides = zip((metric.left, metric.right), matrix.shape, strict=True)
    down, across = (side_pivots(damped(root, matrix), size, matrix) for root, size in sides)
    return down, across


# ------------------------------------------------------------------------------- one after another


def _by_columns(target: Tensor, rounding: _Rounding, inputs: Tensor) -> Tensor:
    """Whole columns from the last to the first: η = ΔW A."""
    m, n = target.shape
    codes, lost = target.new_empty(m, n, dtype=rounding.dtype), torch.zeros_like(target)
    for end in range(n, 0, -_BLOCK):
        block = slice(max(end - _BLOCK, 0), end)
        wanted = target[:, block] - lost[:, end:] @ inputs[end:, block]
        own = inputs[block, block]
        for j in reversed(range(wanted.shape[1])):
            k = block.start + j
            aim = wanted[:, j] - lost[:, k + 1 : end] @ own[j + 1 :, j]
            codes[:, k], values = rounding(aim, (slice(None), k))
            lost[:, k] = values - target[:, k]
    return codes


def _by_entries(target: Tensor, given: _Rounding, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Both sides: with E = Bᵀ ΔW, η = E A.

    Entries whose distances from the last row and column have the same sum do not wait for each
    other; so it is with blocks of them.
    """
    m, n = target.shape
    sizes = [-(-size // _BLOCK) for size in (m, n)]
    rows, columns = (size * _BLOCK - given for size, given in zip(sizes, (m, n), strict=True))
    work = F.pad(target, (0, columns, 0, rows))
    after, below = (
        F.pad(unit, (0, more, 0, more)) for unit, more in ((inputs, columns), (outputs, rows))
    )
    rounding = given.padded(rows, columns)
    codes = torch.zeros_like(work, dtype=rounding.dtype)
    lost, seen = torch.zeros_like(work), torch.zeros_like(work)  # ΔW and E
    within = torch.arange(_BLOCK)
    for turn in reversed(range(sum(sizes) - 1)):
        first = torch.arange(max(0, turn - sizes[1] + 1), min(turn, sizes[0] - 1) + 1)
        i = first[:, None] * _BLOCK + within  # (pairs, block)
        j = (turn - first)[:, None] * _BLOCK + within
        at = i[:, :, None], j[:, None, :]
        # What later blocks of the same rows and columns lost; nothing of this one is there yet.
        aim = work[at] - torch.stack(
            [seen[a[0] : a[-1] + 1] @ after[:, b[0] : b[-1] + 1] for a, b in zip(i, j, strict=True)]
        )
        pulled = torch.stack(
            [
                below[:, a[0] : a[-1] + 1].T @ lost[:, b[0] : b[-1] + 1]
                for a, b in zip(i, j, strict=True)
            ]
        )
        parts = _Block(
            aim - pulled,
            work[at],
            pulled,
            after[j[:, :, None], j[:, None, :]],
            below[i[:, :, None], i[:, None, :]],
            rounding.at(at),
        )
        codes[at], lost[at], seen[at] = parts.solved()
    return codes[:m, :n]


@dataclass(frozen=True)
class _Block:
    """Blocks (P, b, b) of one turn: the values aimed at, those wanted at first, what later blocks
    of the same columns pull, and the blocks' own parts of A and B."""

    aim: Tensor
    target: Tensor
    pulled: Tensor
    after: Tensor
    below: Tensor
    rounding: _Rounding

    def solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, ΔW and E, entry by entry along diagonals."""
        size = self.aim.shape[-1]
        codes = torch.zeros_like(self.aim, dtype=self.rounding.dtype)
        lost, seen = torch.zeros_like(self.aim), torch.zeros_like(self.aim)
        across, down = self.after.mT.contiguous(), self.below.mT.contiguous()
        upright = lost.mT.contiguous()  # ΔW by columns
        for turn in reversed(range(2 * size - 1)):
            i = torch.arange(max(0, turn - size + 1), min(turn, size - 1) + 1)
            j = turn - i
            pull = (down[:, i] * upright[:, j]).sum(-1)
            value = self.aim[:, i, j] - (seen[:, i] * across[:, j]).sum(-1) - pull
            codes[:, i, j], found = self.rounding(value, (slice(None), i, j))
            change = found - self.target[:, i, j]
            lost[:, i, j] = change
            upright[:, j, i] = change
            seen[:, i, j] = change + pull + self.pulled[:, i, j]
        return codes, lost, seen


@dataclass(frozen=True)
class _Rounding:
    """The steps and zero points of every entry, and the codes that there are."""

    steps: Tensor
    zeros: Tensor
    codes: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, found: Grid) -> _Rounding:
        zeros = found._spread(found.zero)
        return cls(found.steps, zeros, found.precision.codes, found.dtype)

    def padded(self, rows: int, columns: int) -> _Rounding:
        """With so many more rows and columns."""
        steps = F.pad(self.steps, (0, columns, 0, rows), value=1.0)
        return replace(self, steps=steps, zeros=F.pad(self.zeros, (0, columns, 0, rows)))

    def at(self, where: tuple[Tensor, ...]) -> _Rounding:
        return replace(self, steps=self.steps[where], zeros=self.zeros[where])

    def __call__(self, aim: Tensor, where: tuple) -> tuple[Tensor, Tensor]:
        """The codes nearest to what is aimed at, at some entries, and what they stand for."""
        step, zero = self.steps[where], self.zeros[where]
        codes = (aim / step).round_().add_(zero).clamp_(*self.codes)
        return codes.to(self.dtype), (codes - zero) * step


# --------------------------------------------------------------------------------- the two moments


def damped(root: Tensor | None, like: Tensor) -> Tensor | None:
    """The Cholesky factor of a full moment, damped; a root that mixes nothing as it is."""
    if root is None or root.dim() == 1:
        return root
    moment = root.to(like) @ root.to(like).mT
    diagonal = moment.diagonal()
    diagonal.add_(DAMPING * diagonal.mean())
    return torch.linalg.cholesky(moment)


def unit(root: Tensor | None) -> Tensor | None:
    """A of K = A D Aᵀ, from a Cholesky factor; None where K mixes nothing."""
    return None if root is None or root.dim() == 1 else root / root.diagonal()


def side_pivots(root: Tensor | None, size: int, like: Tensor) -> Tensor:
    """D of K = A D Aᵀ, in float64, from a Cholesky factor."""
    if root is None:
        return torch.ones(size, dtype=torch.float64, device=like.device)
    return (root if root.dim() == 1 else root.diagonal()).double().square()


def _diagonal(root: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The diagonal of K."""
    if root is None:
        return like.new_ones(size)
    root = root.to(like)
    return root.square() if root.dim() == 1 else root.square().sum(-1)
