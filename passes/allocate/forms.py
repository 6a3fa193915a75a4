"""Low rank in its two forms at every rank: with all of both factors, and without an identity.

Of one weight, or of several with one first factor: these are one matrix that has the rows of all,
whose product with the input is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tensorize.formats.low_rank import EveryRank
from tensorize.formats.order import MANY, neighbours
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.machine import Machine
from tensorize.ir.precision import INPUTS, INTEGERS, ONE_DIGIT
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.allocate.communication import spec_sent
from tensorize.passes.allocate.flops import spec_flops
from tensorize.passes.allocate.times import dense_times, first_times, spec_times
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.filed import Filed

_PIVOTED, PRECISION = 1 << 32, 1 << 40
_PIVOTS_FROM = 0.02
"""The share of its parameters from which on it pays not to store identities."""

BITS, BOTH = "bits", "ranks with bits"
"""Families of forms with fewer bits: of the matrix itself, of its factors. The others are ranks."""

_RANKS = 96
"""Ranks of a weight that are tried at each number of bits."""

_KINDS = tuple(itertools.product(INPUTS, INTEGERS))

_ROUNDING = 0.8
"""The relative change of a weight by rounding such factors, in eps of their dtype; measured are .2
to .8 on random matrices, .1 to .3 for factors that store all. In half precision it counts."""


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

    @property
    def neighbours(self) -> int:
        """How many columns stay together where an identity is not stored, for many rows."""
        first, rows = self.sites[0], max(self.batch_sizes, default=MANY)
        if first.experts or any(use.convolves for use in first.uses):
            return 1
        return neighbours(self.machine, *self.stack.matrix, rows, first.dtype)

    def worthwhile(
        self, ranks: np.ndarray, *, pivots: bool, always: bool = False
    ) -> dict[int, np.ndarray]:
        """The ranks that are points, by form: 0 stores all, others how many columns stay together.

        ``always``: wherever it can be, it is that one alone.
        """
        m, n = self.stack.matrix
        found = {0: ranks[ranks * (m + n) < m * n]}
        if pivots:
            taken = ranks[takes_pivots(self.stack, ranks)]
            if always:
                return {0: np.setdiff1d(found[0], taken), 1: taken}
            fast, form = found[0][~self.slow(found[0], 0)], self.neighbours
            # Not those at which the pass over the input is what alone makes it slower than dense.
            found[form] = np.setdiff1d(taken, np.intersect1d(taken[self.slow(taken, form)], fast))
        return found

    def in_bits(self, ranks: np.ndarray, *, pivots: bool) -> dict[int, np.ndarray]:
        """The ranks that are points at fewer bits, by form: none is far from the next."""
        if not len(ranks):
            return {}
        few = ranks[np.unique(np.linspace(0, len(ranks) - 1, _RANKS).round().astype(int))]
        found = {0: few}
        if pivots:
            found[1] = few[takes_pivots(self.stack, few)]
        return found

    def costs(
        self,
        ranks: np.ndarray,
        pivoted: int,
        precision: str | None = None,
        inputs: str = ONE_DIGIT,
    ) -> np.ndarray:
        """The costs at each of the ranks: (ranks, costs)."""
        stack, count = self.stack, max(self.sites[0].experts, 1)
        every = EveryRank(stack.matrix, ranks, pivoted, precision, inputs)
        size = every.bytes(self.itemsize, sum(len(site.names) for site in self.sites))
        flops = spec_flops(stack, every, self.batch_sizes) + 0 * ranks
        sent = spec_sent(stack, every) + 0 * ranks
        sizes = np.stack(
            [every.parameters * count * stack.reals, size * count, flops, sent, size * count],
            axis=1,
        )
        return np.hstack([sizes, self._times(ranks, pivoted, precision, inputs)])

    def _times(
        self,
        ranks: np.ndarray,
        pivoted: int,
        precision: str | None = None,
        inputs: str = ONE_DIGIT,
    ) -> np.ndarray:
        load, how = (self.batch_sizes, self.machine), (ranks, pivoted, precision, inputs)
        each = [(site, EveryRank(site.matrix, *how)) for site in self.sites]
        total = np.sum([spec_times(site, every, *load) for site, every in each], axis=0)
        saved = [first_times(site, every, *load) for site, every in each[1:]]
        return total - np.sum(saved, axis=0) if saved else total

    def slow(
        self,
        ranks: np.ndarray,
        pivoted: int,
        precision: str | None = None,
        inputs: str = ONE_DIGIT,
    ) -> np.ndarray:
        """At which ranks this form takes more time than the dense weights."""
        load = self.batch_sizes, self.machine
        dense = np.sum([dense_times(site, *load) for site in self.sites], axis=0)
        if not len(ranks) or ranks[0]:
            return (self._times(ranks, pivoted, precision, inputs) > dense).any(-1)
        (site,) = self.sites
        took = spec_times(site, spec_of(site, 0, pivoted, precision, inputs), *load)
        return np.array([(took > dense).any()])


def takes_pivots(site: Site, ranks: np.ndarray) -> np.ndarray:
    """At which ranks it pays not to store an identity in the second factor."""
    m, n = site.matrix
    return (ranks >= _PIVOTS_FROM * (m + n)) & (ranks < min(m, n))


def without_identities(site: Site, spec: Spec, itemsize: int) -> TTSpec | None:
    """A train or a block without its identities; None where that does not pay."""
    if not isinstance(spec, TTSpec) or spec.pivoted or not format_of(spec).planned:
        return None
    if spec.removable < _PIVOTS_FROM * spec.parameters:
        return None
    bare, holders = spec.in_order_of(1), len(site.names)
    return bare if bare.bytes(itemsize, holders) < spec.bytes(itemsize, holders) else None


def rounding_lost(curve: Spectrum, pivoted: int) -> float:
    """What a curve loses by the rounding of factors of which an identity is not stored."""
    eps = torch.finfo(getattr(torch, curve.site.dtype)).eps
    return bool(pivoted) * float(curve.distortion[0]) * (_ROUNDING * eps) ** 2


def labels(
    ranks: np.ndarray, pivoted: int, precision: str | None = None, inputs: str = ONE_DIGIT
) -> np.ndarray:
    """A positive number for each rank in one of the forms, which ``labelled`` reads.

    Of rank 0 it is the dense weight in a precision.
    """
    kind = 0 if precision is None else 1 + _KINDS.index((inputs, precision))
    return ranks + pivoted * _PIVOTED + kind * PRECISION


def labelled(label: int) -> tuple[int, int, str | None, str]:
    """Rank, form, precision, and what inputs are rounded to."""
    kind, rest = divmod(label, PRECISION)
    pivoted, rank = divmod(rest, _PIVOTED)
    inputs, precision = _KINDS[kind - 1] if kind else (ONE_DIGIT, None)
    return rank, pivoted, precision, inputs


def in_file(
    filed: Filed,
    curves: Sequence[Spectrum],
    tails: Sequence[np.ndarray],
    labels: np.ndarray,
    held: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes in a file, and what its codes add, at each label; ``held`` are the bytes in memory.

    Of one weight, or of several with one first factor; ``tails`` are what each loses by rank.
    """
    size, added = held.copy(), np.zeros(len(labels))
    if not all(curve.codes for curve in curves):
        return size, added
    dense = labels == 0
    if dense.any():
        (curve,) = curves
        size[dense], added[dense] = filed.dense(curve)
    factors = np.flatnonzero((labels > 0) & (labels < PRECISION))
    if len(factors) and not curves[0].site.experts:
        pivoted, ranks = np.divmod(labels[factors], _PIVOTED)
        for form, (bytes_, lost) in enumerate(filed.factors(curves, tails)):
            those = (pivoted > 0) == bool(form)
            size[factors[those]] = bytes_[ranks[those]]
            added[factors[those]] = lost[ranks[those]]
    return size, added


def worth_of(labels: np.ndarray, worth: Mapping[str, float]) -> np.ndarray:
    """By what the distortion at each label counts, by what that of its family does."""
    bits, matrix = labels >= PRECISION, labels % PRECISION == 0
    known = [worth.get(family, 1.0) for family in (BITS, BOTH)]
    return np.select([bits & matrix, bits], known, 1.0)


def spec_of(
    site: Site, rank: int, pivoted: int, precision: str | None, inputs: str = ONE_DIGIT
) -> Spec:
    """The spec of a point: of rank 0 that of the matrix itself."""
    experts = (site.experts,) if site.experts else ()
    inner: Spec = DenseSpec((*experts, *site.matrix))
    if rank:
        inner = TTSpec.low_rank(*site.matrix, rank, experts=site.experts, pivoted=pivoted)
    return inner if precision is None else QuantizedSpec(inner, precision, inputs)
