"""Low rank: W = U V, the format that the whitened singular value decomposition gives at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.factors import best_factors, exact_factors
from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.base.tensors import at_work
from tensorize.formats.format import Chain, TensorTrain
from tensorize.ir.machine import Machine, lookup_time, matmul_time
from tensorize.ir.sites import Site
from tensorize.ir.spec import LOW_RANK, Spec, TTSpec

# A tied weight with more entries keeps the factors of its averaged metric.
_LARGEST_ALS = 4_000_000


@dataclass(frozen=True)
class EveryRank(Spec):
    """Low rank of a matrix (m, n) at each of an array of ranks: what it costs is an array too."""

    shape: tuple[int, int]
    every: np.ndarray
    format = LOW_RANK

    @property
    def ranks(self) -> tuple[Any]:  # type: ignore[override]
        return (self.every,)


class LowRank(Chain):
    """Two factors, U (…, M, r) and V (…, r, N)."""

    name = LOW_RANK
    title = "low rank"
    colors = "#1d5fbf", "#e3eefc"
    unasked = spectral = pair = True
    kernels = "pair"

    def multiply(
        self, spec: TTSpec, cores: Sequence[Tensor], x: Tensor, contract: str, bias: Tensor | None
    ) -> Tensor:
        left, right = cores
        if contract == "columns":
            return F.linear(F.linear(x, right), left, bias)
        return F.linear(F.linear(x, left.t()), right.t(), bias)

    def width(self, cores: Sequence[Tensor]) -> int:
        return cores[1].shape[0]

    def lookup(self, spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        left, right = cores
        return F.linear(F.embedding(rows, left), right.t())

    def fits(self, site: Site) -> bool:
        return True

    def factors(
        self,
        spec: TTSpec,
        weight: Tensor,
        metrics: Sequence[Metric],
        exact: TensorTrain[TTSpec] | None = None,
    ) -> tuple[Tensor, ...]:
        (rank,) = spec.ranks
        if rank >= min(weight.shape[-2:]):
            return exact_factors(weight)
        found = best_factors(weight, average(metrics), rank)
        if len(metrics) == 1 or weight.dim() == 3 or weight.numel() > _LARGEST_ALS:
            return found
        return self.improved(spec, found, at_work(weight), metrics)

    def nearest(self, spec: TTSpec, weight: Tensor) -> list[Tensor]:
        return list(best_factors(weight, Metric(1.0, None, None), spec.ranks[0]))

    def energy(self, spec: TTSpec, cores: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
        total = cores[0].new_zeros(())
        for metric in metrics:  # by small Gram matrices
            u, v = root_times(metric.left, cores[0]), times_root(cores[1], metric.right)
            total = total + metric.scale * ((u.t() @ u) * (v @ v.t())).sum()
        return total

    def inner(self, spec: TTSpec, cores: Sequence[Tensor], other: Tensor) -> Tensor:
        return ((other @ cores[1].t()) * cores[0]).sum()

    def flops(self, spec: TTSpec, contract: str) -> Any:
        (m, n), (rank,) = spec.shape[-2:], spec.ranks
        if contract == "whole":  # rebuilt at every call, one row being the worst
            return 2 * rank * m * n + 2 * m * n
        return 2 * rank * (n if contract == "lookup" else m + n)

    def time(self, spec: TTSpec, contract: str, rows: int, machine: Machine, dtype: str) -> Any:
        (m, n), (rank,) = spec.shape[-2:], spec.ranks
        if contract == "whole":  # rebuilt, then used as a dense one
            took = matmul_time(machine, m, rank, n, dtype)
            return took + matmul_time(machine, rows, n, m, dtype)
        if contract == "lookup":
            took = lookup_time(machine, rows, rank, dtype)
            return took + matmul_time(machine, rows, rank, n, dtype)
        first, second = (n, m) if contract == "columns" else (m, n)
        took = matmul_time(machine, rows, first, rank, dtype)
        return took + matmul_time(machine, rows, rank, second, dtype)
