"""The weight as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorize.formats.format import Format
from tensorize.ir.coded import DenseSpec
from tensorize.ir.machine import Machine, lookup_time, matmul_time
from tensorize.ir.spec import DENSE


class Dense(Format[DenseSpec]):
    """One core, the weight itself. A weight that keeps its parameter has no spec."""

    name = DENSE
    title = "dense"
    colors = "#b45309", "#fdf0dc"
    unasked = True

    def reconstruct(self, spec: DenseSpec, cores: Sequence[Tensor]) -> Tensor:
        return cores[0]

    def rows_apart(self, spec: DenseSpec) -> int:
        return 0

    def flops(self, spec: DenseSpec, contract: str) -> int:
        m, n = spec.shape[-2:]
        return 0 if contract == "lookup" else 2 * m * n

    def time(self, spec: DenseSpec, contract: str, rows: int, machine: Machine, dtype: str) -> Any:
        m, n = spec.shape[-2:]
        if contract == "lookup":
            return lookup_time(machine, rows, n, dtype)
        return matmul_time(machine, rows, n, m, dtype)


def is_dense(format: str) -> bool:
    """Whether what a report calls this was left dense."""
    return format == DENSE
