"""What weights take in a file of which every entry loses θ, and what that adds to what they lose.

Weights in their own dtype are coded in their metrics, dense or as two factors; all else is stored
without loss and counts with the bytes that it has in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tensorize.algebra.rates import components_at, matrix_at
from tensorize.passes.curves.curve import Spectrum

SAID = 24
"""Bytes that a file says of every tensor, about."""

STREAMS = 2048
"""Bytes of the tables of all streams, about."""

_SIDE = 0.75
"""Bytes of a step, or of the level of a row, about."""

Sizes = tuple[np.ndarray, np.ndarray]
"""Bytes and distortion at every rank, from zero on."""


@dataclass(frozen=True)
class Filed:
    """Weights at some θ; ``worth`` is what the distortion of codes counts."""

    theta: float
    worth: float = 1.0

    def dense(self, curve: Spectrum) -> tuple[float, float]:
        """Bytes and distortion of a weight that is not factorized."""
        rows, columns = curve.sides
        count = max(curve.site.experts, 1)
        bits, lost = matrix_at(self.theta, curve.scale, rows, columns)
        sides = 2 * count * rows.count + columns.count
        return count * bits / 8 + _SIDE * sides + SAID, self.worth * count * lost

    def factors(
        self, curves: Sequence[Spectrum], tails: Sequence[np.ndarray]
    ) -> tuple[Sizes, Sizes]:
        """Of factors that are stored in full, and without an identity.

        Of one weight, or of several with one V; ``tails`` are what each loses by rank.
        """
        rows, columns = [curve.sides[0] for curve in curves], curves[0].sides[1]
        energies = [np.maximum(-np.diff(tail), 0.0) for tail in tails]
        whole = np.sum(energies, axis=0)
        count = np.arange(len(whole) + 1)
        parts = [(whole, columns), *zip(energies, rows, strict=True)]
        found = [components_at(self.theta, *part) for part in parts]
        bits, lost = (_sums(np.sum(each, axis=0)) for each in zip(*found, strict=True))
        lengths = sum(side.count for side in rows)
        said = _SIDE * (2 * lengths + columns.count + count * (2 + len(rows)))
        said = said + SAID * (1 + len(rows))
        # Without an identity each component of V is a mixture of all, and counts as their mean.
        mixed = [components_at(self.theta, _means(part), side) for part, side in parts]
        (bits_of_v, lost_of_v), *others = mixed
        stored = 1 - count[1:] / columns.count
        mixed_bits = bits_of_v * stored + sum(each for each, _ in others)
        mixed_lost = lost_of_v * stored + sum(each for _, each in others)
        without = [np.append(0.0, count[1:] * each) for each in (mixed_bits, mixed_lost)]
        bytes_, mixed_bytes = bits / 8 + said, without[0] / 8 + said
        return (bytes_, self.worth * lost), (mixed_bytes, self.worth * without[1])


def _sums(values: np.ndarray) -> np.ndarray:
    return np.append(0.0, np.cumsum(values))


def _means(energies: np.ndarray) -> np.ndarray:
    """Of the energies of the components up to each."""
    return np.cumsum(energies) / np.arange(1, len(energies) + 1)


def first_theta(
    spectra: Mapping[str, Spectrum], sizes: Mapping[str, tuple[int, int]], limit: float
) -> float:
    """About the θ at which a file of dense weights has so many bytes."""
    curves = [curve for curve in spectra.values() if curve.codes]
    coded = {name for name, curve in spectra.items() if curve.codes}
    others = sum(size for name, (_, size) in sizes.items() if name not in coded)
    low, high = -200.0, 100.0
    while high - low > 1:
        middle = (low + high) / 2
        taken = sum(Filed(2.0**middle).dense(curve)[0] for curve in curves) + others
        low, high = (middle, high) if taken > limit else (low, middle)
    return 2.0**high
