"""Tensor trains and block low rank of one weight: the splits that are tried, and their points.

Where they are asked for, or where a cheap probe finds structure that low rank misses. TT-SVD and
the SVD of blocks know the Frobenius norm only: each point is improved in the metric by alternating
least squares (``als``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.algebra.decompose import block_svd, cut_block, tt_svd
from tensorize.algebra.modes import balanced_modes, largest_divisor
from tensorize.algebra.rounding import round_tt
from tensorize.ir.spec import BLOCK, LOW_RANK, TTSpec
from tensorize.passes.curves.als import error_of, improved
from tensorize.passes.curves.metric import Metric

_TT_POINTS = 8
_PROBE_RANK = 8
# So many blocks of rows, and of columns, are tried, or the most below that divide them; the shares
# of the parameters at which they are compared.
_BLOCKS, _SHARES = (2, 4, 8, 16), (0.1, 0.25, 0.5)

# Of the whole process, while weights are probed side by side.
_random_state = threading.Lock()


@dataclass(frozen=True)
class TensorTrain:
    """The exact tensor train of a weight for one split of its modes; rounding gives the others.

    Or its exact block low rank, of which fewer components are again the best.
    """

    spec: TTSpec
    cores: tuple[Tensor, ...]

    def rounded(self, ranks: Sequence[int]) -> tuple[TTSpec, list[Tensor]]:
        """The train rounded to ``ranks`` (Oseledets 2011, algorithm 2)."""
        if self.spec.format == BLOCK:
            return cut_block(self.spec, self.cores, *ranks)
        return round_tt(self.spec, list(self.cores), tuple(ranks))

    def cut(
        self, ranks: Sequence[int], weight: Tensor, metrics: Sequence[Metric]
    ) -> tuple[Tensor, ...]:
        """Rounded to smaller ranks, and where the metric is another, improved in that."""
        spec, cores = self.rounded(ranks)
        if all(metric.plain for metric in metrics):
            return tuple(cores)
        return improved(spec, cores, weight, metrics)


def trains_of(weight: Tensor, counts: Sequence[int]) -> list[TensorTrain]:
    """The exact trains of so many cores, each of one balanced split."""
    m, n = weight.shape
    trains: list[TensorTrain] = []
    for count in counts:
        row_modes = balanced_modes(m, count)
        column_modes = tuple(reversed(balanced_modes(n, count)))
        split = TTSpec(row_modes, column_modes, (1,) * (count - 1))
        if split.format == LOW_RANK or 1 in map(math.prod, split.core_shapes):
            continue  # primes: nothing to split, or a core that holds no mode
        spec, cores = tt_svd(weight, row_modes, column_modes)
        trains.append(TensorTrain(spec, tuple(core.contiguous() for core in cores)))
    return trains


def blocks_of(weight: Tensor) -> list[TensorTrain]:
    """The exact block low rank of the splits that lose the least without data.

    Of all counts of blocks that are tried, those stay that are the best at some share of the
    parameters.
    """
    m, n = weight.shape
    trains: dict[TTSpec, TensorTrain] = {}
    for count in _BLOCKS:
        m1, n0 = (largest_divisor(size, count) for size in (m, n))
        one = TTSpec.block((m // m1, m1), (n0, n // n0), 1)
        if one.format == BLOCK and one.parameters < m * n and one not in trains:
            spec, cores = block_svd(weight, one.row_modes, one.column_modes)
            trains[one] = TensorTrain(spec, tuple(core.contiguous() for core in cores))

    def kept(one: TTSpec, share: float) -> float:
        """The energy that is kept at a share of the parameters."""
        rank = min(int(share * m * n / one.parameters), *trains[one].spec.ranks)
        left = trains[one].cores[0].reshape(*reversed(one.row_modes), one.column_modes[0], -1)
        # Each component's left vectors have its singular value as their squared length.
        return float(left[..., :rank].double().square().sum(1).square().sum())

    best = {max(trains, key=lambda one: kept(one, share)) for share in _SHARES if trains}
    return [train for one, train in trains.items() if one in best]


def points_of(
    trains: Sequence[TensorTrain], weight: Tensor, metrics: Sequence[Metric]
) -> list[tuple[TTSpec, float]]:
    """What roundings of these trains lose."""
    points: list[tuple[TTSpec, float]] = []
    for train in trains:
        for ranks in _rank_ladder(train.spec, weight.numel()):
            point = train.spec.with_ranks(ranks)
            cores = train.cut(ranks, weight, metrics)
            points.append((point, error_of(point, cores, weight, metrics)))
    return points


def _rank_ladder(exact: TTSpec, dense: int) -> list[tuple[int, ...]]:
    """Ranks growing geometrically from 1 as long as the cores are smaller than the weight."""
    ladder: list[tuple[int, ...]] = []
    for step in range(_TT_POINTS + 1):
        bound = max(1, round(max(exact.ranks) ** (step / _TT_POINTS)))
        ranks = tuple(min(bound, r) for r in exact.ranks)
        if ranks not in ladder and exact.with_ranks(ranks).parameters < dense:
            ladder.append(ranks)
    return ladder


def has_kronecker_structure(weight: Tensor) -> bool:
    """Whether a few Kronecker terms hold more of W than low rank does at as many parameters.

    Compares the energy that ``_PROBE_RANK`` terms keep (randomized SVD of the rearranged weight,
    Van Loan & Pitsianis 1993) with the energy of the best low rank of the same size.
    """
    m, n = weight.shape
    (m1, m2), (n1, n2) = balanced_modes(m, 2), tuple(reversed(balanced_modes(n, 2)))
    if min(m1, m2, n1, n2) < 2:
        return False
    size = m1 * n1 + m2 * n2
    terms = min(_PROBE_RANK, m * n // (2 * size))
    if terms == 0:
        return False  # so small that a single term saves little
    rank = max(1, terms * size // (m + n))
    rearranged = weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    with _random_state, torch.random.fork_rng():
        torch.manual_seed(0)
        kept_tt = torch.svd_lowrank(rearranged, q=terms, niter=2)[1].square().sum()
        kept_low = torch.svd_lowrank(weight, q=min(rank, m, n), niter=2)[1].square().sum()
    whole = weight.square().sum()
    return bool((whole - kept_tt) < 0.5 * (whole - kept_low))
