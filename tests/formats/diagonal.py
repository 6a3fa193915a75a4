"""A format that the product does not know: a diagonal plus low rank, W = diag(d) + U V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.formats.format import Format, TensorTrain
from tensorize.ir.machine import Machine, matmul_time
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec


@dataclass(frozen=True)
class DiagonalSpec(Spec):
    """``side`` entries of d, U of (side, rank) and V of (rank, side)."""

    side: int
    rank: int
    format = "diagonal_low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def ranks(self) -> tuple[int]:
        return (self.rank,)

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.side,), (self.side, self.rank), (self.rank, self.side)

    def with_ranks(self, ranks: Sequence[int]) -> DiagonalSpec:
        return DiagonalSpec(self.side, *ranks)

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format, "side": self.side, "rank": self.rank}


class DiagonalLowRank(Format[DiagonalSpec]):
    name = "diagonal_low_rank"
    title = "diagonal plus low rank"

    def read(self, data: Mapping[str, Any]) -> DiagonalSpec:
        return DiagonalSpec(data["side"], data["rank"])

    def reconstruct(self, spec: DiagonalSpec, cores: Sequence[Tensor]) -> Tensor:
        diagonal, left, right = cores
        return torch.diag(diagonal) + left @ right

    def multiply(
        self,
        spec: DiagonalSpec,
        cores: Sequence[Tensor],
        x: Tensor,
        contract: str,
        bias: Tensor | None,
    ) -> Tensor:
        diagonal, left, right = cores
        if contract == "rows":
            left, right = right.t(), left.t()
        return x * diagonal + F.linear(F.linear(x, right), left, bias)

    def fits(self, site: Site) -> bool:
        return super().fits(site) and site.matrix[0] == site.matrix[1]

    def exact(self, weight: Tensor, *, asked: bool) -> list[TensorTrain[DiagonalSpec]]:
        side = len(weight)
        cores = weight.new_zeros(side), weight, torch.eye(side, dtype=weight.dtype)
        return [TensorTrain(DiagonalSpec(side, side), cores)]

    def rounded(
        self, exact: TensorTrain[DiagonalSpec], ranks: Sequence[int]
    ) -> tuple[DiagonalSpec, Sequence[Tensor]]:
        spec, weight = exact.spec.with_ranks(ranks), exact.cores[1]
        diagonal = left = right = weight.new_zeros(len(weight))
        for _ in range(50):  # each in turn is the best for the other
            u, s, vh = torch.linalg.svd(weight - torch.diag(diagonal))
            left, right = u[:, : spec.rank] * s[: spec.rank], vh[: spec.rank]
            diagonal = (weight - left @ right).diagonal().clone()
        return spec, (diagonal, left, right)

    def flops(self, spec: DiagonalSpec, contract: str) -> int:
        return 2 * spec.side + 4 * spec.side * spec.rank

    def time(
        self, spec: DiagonalSpec, contract: str, rows: int, machine: Machine, dtype: str
    ) -> float:
        sizes = (spec.side, spec.rank), (spec.rank, spec.side), (1, spec.side)
        return sum(float(matmul_time(machine, rows, *size, dtype)) for size in sizes)
