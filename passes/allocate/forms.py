"""Low rank in its two forms at every rank: with all of both factors, and without an identity.

Of one weight, or of several with one first factor: these are one matrix that has the rows of all,
whose product with the input is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tensorize.formats.low_rank import EveryRank
from tensorize.ir.machine import Machine
from tensorize.ir.sites import Site
from tensorize.passes.allocate.flops import spec_bytes, spec_flops
from tensorize.passes.allocate.times import dense_times, first_times, spec_times
from tensorize.passes.curves.curve import Spectrum

_PIVOTED = 1 << 32
_PIVOTS_FROM = 0.02
"""The share of its parameters from which on it pays not to store an identity of low rank."""

_ROUNDING = 1.2
"""The relative change of a weight by rounding such factors, in eps of their dtype; measured are .3
to 1.2 on random matrices, .1 to .3 for factors that store all. In half precision it counts."""


@dataclass(frozen=True)
class Forms:
    """What low rank costs of weights with one first factor, of one alone, in each of its forms."""

    sites: tuple[Site, ...]
    itemsize: int
    batch_sizes: Sequence[int]
    machine: Machine

    @property
    def stack(self) -> Site:
        """The weights on each other, as one."""
        first = self.sites[0]
        if len(self.sites) == 1:
            return first
        return replace(first, shape=(sum(s.matrix[0] for s in self.sites), first.matrix[1]))

    def worthwhile(
        self, ranks: np.ndarray, *, pivots: bool, always: bool = False
    ) -> dict[bool, np.ndarray]:
        """The ranks that are points, by form; True is the one without an identity.

        ``always``: wherever it can be, it is that one alone.
        """
        m, n = self.stack.matrix
        found = {False: ranks[ranks * (m + n) < m * n]}
        if pivots:
            taken = ranks[takes_pivots(self.stack, ranks)]
            if always:
                return {False: np.setdiff1d(found[False], taken), True: taken}
            fast = np.setdiff1d(found[False], self._slow(found[False], False))
            # Not those at which the pass over the input is what alone makes it slower than dense.
            found[True] = np.setdiff1d(taken, np.intersect1d(self._slow(taken, True), fast))
        return found

    def costs(self, ranks: np.ndarray, pivoted: bool) -> np.ndarray:
        """Parameters, bytes, FLOPs and times at each of the ranks: (ranks, costs)."""
        stack, count = self.stack, max(self.sites[0].experts, 1)
        every = EveryRank(stack.matrix, ranks, pivoted)
        size = spec_bytes(every, self.itemsize, holders=sum(len(site.names) for site in self.sites))
        flops = spec_flops(stack, every, self.batch_sizes) + 0 * ranks
        sizes = np.stack([every.parameters * count, size * count, flops], axis=1)
        return np.hstack([sizes, self._times(ranks, pivoted)])

    def _times(self, ranks: np.ndarray, pivoted: bool) -> np.ndarray:
        load = self.batch_sizes, self.machine
        each = [(site, EveryRank(site.matrix, ranks, pivoted)) for site in self.sites]
        total = np.sum([spec_times(site, every, *load) for site, every in each], axis=0)
        saved = [first_times(site, every, *load) for site, every in each[1:]]
        return total - np.sum(saved, axis=0) if saved else total

    def _slow(self, ranks: np.ndarray, pivoted: bool) -> np.ndarray:
        """The ranks at which this form takes more time than the dense weights."""
        load = self.batch_sizes, self.machine
        dense = np.sum([dense_times(site, *load) for site in self.sites], axis=0)
        return ranks[(self._times(ranks, pivoted) > dense).any(-1)]


def takes_pivots(site: Site, ranks: np.ndarray) -> np.ndarray:
    """At which ranks it pays not to store an identity in the second factor."""
    m, n = site.matrix
    return (ranks >= _PIVOTS_FROM * (m + n)) & (ranks < min(m, n))


def rounding_lost(curve: Spectrum, pivoted: bool) -> float:
    """What a curve loses by the rounding of factors of which an identity is not stored."""
    eps = torch.finfo(getattr(torch, curve.site.dtype)).eps
    return pivoted * float(curve.distortion[0]) * (_ROUNDING * eps) ** 2


def labels(ranks: np.ndarray, pivoted: bool) -> np.ndarray:
    """A positive number for each rank in one of the forms, which ``labelled`` reads."""
    return ranks + pivoted * _PIVOTED


def labelled(label: int) -> tuple[int, bool]:
    """Rank and form."""
    pivoted, rank = divmod(label, _PIVOTED)
    return rank, bool(pivoted)
