"""Tensor trains: chains of cores, each with modes of the rows and of the columns.

TT-SVD knows the Frobenius norm only: each rounding is improved in the metric by alternating least
squares. They are tried where they are asked for, or where a cheap probe finds structure that low
rank misses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.decompose import tt_svd
from tensorize.algebra.modes import balanced_modes, max_ranks
from tensorize.algebra.rounding import round_tt
from tensorize.formats.format import Chain, TensorTrain
from tensorize.ir.machine import Machine, lookup_time, matmul_time
from tensorize.ir.spec import TT, TTSpec

_PROBE_RANK = 8

# Of the whole process, while weights are probed side by side.
_random_state = threading.Lock()


class Train(Chain):
    """Core k of (r, m_k, n_k, r'), of two or three balanced modes a side."""

    name = TT
    title = "tensor train"
    colors = "#0f7b6c", "#dcf4ef"
    planned = True
    kernels = "chain"

    def lookup(self, spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        """A row number is split into one digit a core (mixed radix in the row modes), each core
        gives the slice of its digit, and the slices are multiplied from left to right (Hrinchuk et
        al. 2020)."""
        remaining = rows.reshape(-1)
        digits: list[Tensor] = []
        for mode in reversed(spec.row_modes[1:]):
            digits.append(remaining % mode)
            remaining = torch.div(remaining, mode, rounding_mode="floor")
        digits.append(remaining)  # not reduced: the first core refuses a row that the table lacks
        digits.reverse()
        # result: (B, columns so far, rank); a core's slice: (B, rank, columns, next rank)
        result: Tensor | None = None
        ranks = (1, *spec.ranks, 1)
        for k, core in enumerate(cores):
            mode, columns = spec.row_modes[k], spec.column_modes[k]
            table = core.reshape(ranks[k], mode, columns, ranks[k + 1]).transpose(0, 1)
            part = F.embedding(digits[k], table.reshape(mode, -1))
            part = part.reshape(-1, ranks[k], columns * ranks[k + 1])
            if result is None:
                result = part
            else:
                so_far = math.prod(spec.column_modes[:k])
                result = torch.bmm(result.reshape(-1, so_far, ranks[k]), part)
        assert result is not None
        return result.reshape(*rows.shape, math.prod(spec.column_modes))

    def suggests(self, weight: Tensor) -> bool:
        return has_kronecker_structure(weight)

    def exact(self, weight: Tensor, *, asked: bool) -> list[TensorTrain[TTSpec]]:
        trains: list[TensorTrain[TTSpec]] = []
        # Rows of zeros, as of padding, stay so where no core has entries of several rows.
        apart = bool((weight == 0).all(1).any())
        for count in (2, 3) if asked else (2,):
            row_modes, column_modes = _modes(len(weight), weight.shape[1], count, apart)
            split = TTSpec(row_modes, column_modes, (1,) * (count - 1))
            if split.format != TT or 1 in map(math.prod, split.core_shapes):
                continue  # primes: nothing to split, or a core that holds no mode
            spec, cores = tt_svd(weight, row_modes, column_modes)
            trains.append(TensorTrain(spec, tuple(core.contiguous() for core in cores)))
        return trains

    def widest(self, m: int, n: int, *, apart: bool = False) -> list[TTSpec]:
        modes = _modes(m, n, 3 if apart else 2, apart)
        spec = TTSpec(*modes, max_ranks(*modes))
        return [spec] if spec.format == TT else []

    def largest_ranks(self, spec: TTSpec) -> tuple[int, ...]:
        return max_ranks(spec.row_modes, spec.column_modes)

    def rounded(
        self, exact: TensorTrain[TTSpec], ranks: Sequence[int]
    ) -> tuple[TTSpec, Sequence[Tensor]]:
        return round_tt(exact.spec, list(exact.cores), tuple(ranks))

    def nearest(self, spec: TTSpec, weight: Tensor) -> list[Tensor]:
        cores = tt_svd(weight, spec.row_modes, spec.column_modes, spec.ranks)[1]
        norm = math.prod(float(core.norm()) for core in cores) ** (1 / len(cores))
        return [core * (norm / max(float(core.norm()), 1e-30)) for core in cores]

    def flops(self, spec: TTSpec, contract: str) -> int:
        assert contract == "lookup"
        flops, columns = 0, spec.column_modes[0]
        for k, rank in enumerate(spec.ranks):
            after = spec.ranks[k + 1] if k + 1 < len(spec.ranks) else 1
            flops += 2 * columns * rank * spec.column_modes[k + 1] * after
            columns *= spec.column_modes[k + 1]
        return flops

    def time(self, spec: TTSpec, contract: str, rows: int, machine: Machine, dtype: str) -> float:
        assert contract == "lookup"
        total, columns = 0.0, 1
        ranks = (1, *spec.ranks, 1)
        for k, mode in enumerate(spec.column_modes):
            total += lookup_time(machine, rows, ranks[k] * mode * ranks[k + 1], dtype)
            if k > 0:
                total += matmul_time(machine, rows * columns, ranks[k], mode * ranks[k + 1], dtype)
            columns *= mode
        return total


def _modes(
    m: int, n: int, count: int, apart: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes of rows and columns; ``apart``: the first core has all rows, and no columns."""
    if apart:
        ones = (1,) * (count - 1)
        return (m, *ones), (1, *reversed(balanced_modes(n, count - 1)))
    return balanced_modes(m, count), tuple(reversed(balanced_modes(n, count)))


def has_kronecker_structure(weight: Tensor) -> bool:
    """Whether a few Kronecker terms hold more of W than low rank does at as many parameters.

    Compares the energy that ``_PROBE_RANK`` terms keep (randomized SVD of the rearranged weight,
    Van Loan & Pitsianis 1993) with the energy of the best low rank of the same size.
    """
    m, n = weight.shape
    (m1, m2), (n1, n2) = _modes(m, n, 2)
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
