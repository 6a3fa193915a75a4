"""What matrices are expected to take and to lose where every entry loses θ, without coding them.

The step of an entry is the one whose roundings lose θ (``water.py``). An entry that would cost x if
nothing were left of it has a spread of √(x / 12 θ) steps. Taken as a Gaussian number it has so many
bits of entropy, and loses a share of θ that is one where x is large and x / θ where it is small:
both are functions of x / θ alone.

Of a matrix x is known by what its rows and columns count. Where entries are rounded one after the
other, each takes up what later ones lost: that adds θ (ρ_i κ_j - 1) to x, with ρ and κ the pivots D
times the diagonals of the inverses of the moments, as K⁻¹ = A⁻ᵀ D⁻¹ A⁻¹. Of factors in a metric
component k costs σ_k², which is spread over the entries of its row of V as κ is, and of its column
of U as ρ is, if its directions are any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.algebra.quantise import damped, side_pivots, unit

_GROUPS = 48
"""Rows and columns that count about the same are taken together: into so many groups."""

_ROUNDS = 3
"""How often what is lost is estimated anew from what the others lose."""

_LONGER = 1.03
"""What streams of codes take, of their entropy."""

_LEAST, _MOST, _STEP = -12.0, 16.0, 0.1
"""Logarithms of x / θ (base 2) that are in the table; beyond, both functions are lines."""


@dataclass(frozen=True)
class Side:
    """Rows or columns of a matrix in groups, (G,) each: how many they are, their mean squares in
    the metric, ρ or κ, and what a rounding of them counts without damping."""

    counts: np.ndarray
    sizes: np.ndarray
    pushed: np.ndarray
    weights: np.ndarray

    @property
    def count(self) -> float:
        return float(self.counts.sum())

    @classmethod
    def of(cls, root: Tensor | None, squares: Tensor) -> Side:
        """``squares``: of the entries of every row or column, their mean."""
        squares = squares.float()
        size = len(squares)
        known = damped(root, squares)
        pivots, mixing = side_pivots(known, size, squares), unit(known)
        pushed, weights = torch.ones_like(pivots), torch.ones_like(pivots)
        if mixing is not None and root is not None:
            identity = torch.eye(size, device=mixing.device)
            inverse = torch.linalg.solve_triangular(
                mixing, identity, upper=False, unitriangular=True
            )
            pushed = pivots * (inverse.square().double() / pivots[:, None]).sum(0)
            weights = (inverse @ root.to(inverse)).square().double().sum(1) / pivots
        sizes = squares.double() * pivots
        order = sizes.argsort()
        parts = np.array_split(np.arange(size), min(_GROUPS, size))

        def means(values: Tensor) -> np.ndarray:
            logs = values[order].clamp_min(1e-300).log().cpu().numpy()
            return np.exp([logs[part].mean() for part in parts])

        counts = np.array([len(part) for part in parts], dtype=float)
        return cls(counts, means(sizes), means(pushed), means(weights))


def sides_of(metric: Metric, squares: tuple[Tensor, Tensor]) -> tuple[Side, Side]:
    """Of the rows and of the columns of a matrix, whose entries have these mean squares."""
    rows, columns = squares
    return Side.of(metric.left, rows), Side.of(metric.right, columns)


def matrix_at(theta: float, scale: float, rows: Side, columns: Side) -> tuple[float, float]:
    """Bits and distortion of a matrix; columns' sizes are relative to those of all entries."""
    counts = np.outer(rows.counts, columns.counts)
    whole = scale * np.outer(rows.sizes, columns.sizes)
    more = theta * (np.outer(rows.pushed, columns.pushed) - 1)
    aimed = whole
    for _ in range(_ROUNDS):
        left = (counts * _lost(aimed / theta)).sum() / counts.sum()
        aimed = whole + left * more
    found = _lost(aimed / theta)
    weights = np.outer(rows.weights, columns.weights)
    bits = float((counts * _bits(aimed / theta)).sum())
    return _LONGER * bits, theta * float((counts * weights * found).sum())


def components_at(theta: float, energies: np.ndarray, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Bits and distortion of one side of every component (R,) of some energies σ² (R,)."""
    shares = energies[:, None] / theta * side.pushed / side.count
    bits = _bits(shares) @ side.counts
    return _LONGER * bits, theta * (_lost(shares) @ (side.counts * side.weights))


# ------------------------------------------------------------------------------- Gaussian entries


@cache
def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of x / θ, bits, and shares of θ."""
    logs = np.arange(_LEAST, _MOST + _STEP / 2, _STEP)
    bits, lost = np.zeros_like(logs), np.zeros_like(logs)
    for k, log in enumerate(logs.tolist()):
        spread = (2.0**log / 12) ** 0.5
        if spread > 8:
            bits[k], lost[k] = np.log2(spread * np.sqrt(2 * np.pi * np.e)), 1.0
            continue
        x = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
        share = (-x.square() / 2).exp()
        share /= share.sum()
        codes = (spread * x).round()
        lost[k] = 12 * float((share * (spread * x - codes).square()).sum())
        edges = torch.arange(int(codes.max()) + 1, dtype=torch.float64) + 0.5
        above = torch.special.erfc(edges / spread / 2**0.5) / 2
        of_codes = torch.cat(
            [1 - 2 * above[:1], above - torch.cat([above[1:], above.new_zeros(1)])]
        )
        entropy = -torch.special.xlogy(of_codes, of_codes) / np.log(2)
        bits[k] = float(entropy[0] + 2 * entropy[1:].sum())
    return logs, bits, lost


def _bits(shares: np.ndarray) -> np.ndarray:
    logs, bits, _ = _table()
    found = np.log2(np.maximum(shares, 1e-300))
    return np.interp(found, logs, bits, left=0.0) + np.maximum(found - _MOST, 0.0) / 2


def _lost(shares: np.ndarray) -> np.ndarray:
    logs, _, lost = _table()
    found = np.interp(np.log2(np.maximum(shares, 1e-300)), logs, lost)
    return np.where(shares < 2.0**_LEAST, shares, found)
