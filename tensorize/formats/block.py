"""Block low rank: every block of W a matrix of low rank of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.decompose import block_svd, cut_block
from tensorize.algebra.modes import largest_divisor
from tensorize.formats.format import Chain, TensorTrain
from tensorize.ir.machine import Machine, lookup_time, matmul_time
from tensorize.ir.spec import BLOCK, TTSpec

# So many blocks of rows, and of columns, are tried, or the most below that divide them; the shares
# of the parameters at which they are compared; and those of a weight that is to be trained.
_BLOCKS, _SHARES, _FRESH = (2, 4, 8, 16), (0.1, 0.25, 0.5), 8


class Block(Chain):
    """Two cores that share an index of the rows and one of the columns (``TTSpec.block``)."""

    name = BLOCK
    title = "block low rank"
    colors = "#7e3fb3", "#f1e6fa"
    planned = True
    kernels = "chain"

    def lookup(self, spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        """A row of the left core's slices, each times the right core's block of its columns."""
        (m0, m1), (n0, n1), (rank,) = spec.row_modes, spec.column_modes, spec.ranks
        left, right = cores[0].reshape(m1, m0, n0 * rank), cores[1].reshape(n0, m1, rank * n1)
        outer = torch.div(rows, m1, rounding_mode="floor")
        inner = rows - outer * m1
        place = torch.where((outer >= 0) & (outer < m0), inner * m0 + outer, -1)  # -1 is refused
        slices = F.embedding(place, left.reshape(m1 * m0, -1))
        blocks = F.embedding(inner, right.transpose(0, 1).reshape(m1, -1))
        slices = slices.reshape(*rows.shape, n0, 1, rank)
        result = slices @ blocks.reshape(*rows.shape, n0, rank, n1)
        return result.reshape(*rows.shape, n0 * n1)

    def exact(self, weight: Tensor, *, asked: bool) -> list[TensorTrain[TTSpec]]:
        """Of all counts of blocks that are tried, those that without data are the best at some
        share of the parameters."""
        m, n = weight.shape
        found: dict[TTSpec, TensorTrain[TTSpec]] = {}
        for count in _BLOCKS:
            one = _split(m, n, count, 1)
            if one.format == BLOCK and one.parameters < m * n and one not in found:
                spec, cores = block_svd(weight, one.row_modes, one.column_modes)
                found[one] = TensorTrain(spec, tuple(core.contiguous() for core in cores))

        def kept(one: TTSpec, share: float) -> float:
            """The energy that is kept at a share of the parameters."""
            rank = min(int(share * m * n / one.parameters), *found[one].spec.ranks)
            left = found[one].cores[0].reshape(*reversed(one.row_modes), one.column_modes[0], -1)
            # Each component's left vectors have its singular value as their squared length.
            return float(left[..., :rank].double().square().sum(1).square().sum())

        best = {max(found, key=lambda one: kept(one, share)) for share in _SHARES if found}
        return [exact for one, exact in found.items() if one in best]

    def widest(self, m: int, n: int, *, apart: bool = False) -> list[TTSpec]:
        one = _split(m, n, _FRESH, 1)
        return [one.with_ranks(self.largest_ranks(one))] if one.format == BLOCK else []

    def largest_ranks(self, spec: TTSpec) -> tuple[int, ...]:
        return (min(spec.row_modes[0], spec.column_modes[1]),)

    def rounded(
        self, exact: TensorTrain[TTSpec], ranks: Sequence[int]
    ) -> tuple[TTSpec, Sequence[Tensor]]:
        return cut_block(exact.spec, exact.cores, *ranks)

    def nearest(self, spec: TTSpec, weight: Tensor) -> list[Tensor]:
        return block_svd(weight, spec.row_modes, spec.column_modes, *spec.ranks)[1]

    def flops(self, spec: TTSpec, contract: str) -> int:
        assert contract == "lookup"
        return 2 * spec.ranks[0] * spec.shape[-1]

    def time(self, spec: TTSpec, contract: str, rows: int, machine: Machine, dtype: str) -> float:
        """A slice of the left core, a block of the right one, their product."""
        assert contract == "lookup"
        (rank,), (blocks, width) = spec.ranks, spec.column_modes
        took = lookup_time(machine, rows, blocks * rank, dtype)
        took += lookup_time(machine, rows, blocks * rank * width, dtype)
        return took + matmul_time(machine, 1, rank, width, dtype, stacked=rows * blocks)


def _split(m: int, n: int, count: int, rank: int) -> TTSpec:
    m1, n0 = (largest_divisor(size, count) for size in (m, n))
    return TTSpec.block((m // m1, m1), (n0, n // n0), rank)
