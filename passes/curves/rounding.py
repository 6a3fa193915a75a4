"""What a weight loses by integers of a few bits, in each of its forms, without rounding it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.algebra.quantise import expected, expected_by_column, grid
from tensorize.formats.low_rank import largest_that_pays
from tensorize.ir.precision import INTEGERS, Precision


@dataclass(frozen=True)
class Rounding:
    """What one precision adds to the distortion of a weight.

    ``dense`` of the matrix itself; ``low_rank[r]`` of its factors of rank r. Each of their
    components adds what its column of U and its row of V lose, as the other factor sees it. Where
    inputs are rounded too, what that costs is added: once for the matrix, twice for two factors.
    """

    precision: str
    dense: float
    low_rank: Tensor


def roundings(
    weight: Tensor, metrics: Sequence[Metric], precisions: Sequence[str]
) -> tuple[Rounding, ...]:
    """Those of a matrix (M, N), or of a stack of them as a whole, at least in float32."""
    if not precisions:
        return ()
    metric = average(metrics)
    matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
    m, n = matrices.shape[1:]
    factors = [best_factors(matrix, metric, largest_that_pays(m, n)) for matrix in matrices]
    found = []
    for kind in (INTEGERS[name] for name in precisions):
        inputs = sum(_inputs_lost(matrix, kind, metric) for matrix in matrices)
        dense = sum(expected(grid(matrix, kind, metric).steps, metric) for matrix in matrices)
        each = torch.stack([_components(*pair, kind, metric) for pair in factors]).sum(0)
        sums = torch.cat([each.new_zeros(1), each.cumsum(0) + 2 * inputs])
        rest = sums[-1].expand(min(m, n) + 1 - len(sums))
        found.append(Rounding(kind.name, dense + inputs, torch.cat([sums, rest]).cpu()))
    return tuple(found)


def _inputs_lost(matrix: Tensor, kind: Precision, metric: Metric) -> float:
    """What a matrix loses where every row of its inputs is rounded to as many bits as it has.

    The errors of entries are independent, of variance step² / 12. The step follows from the largest
    entry of a row: of Gaussian ones 2 ln N times their mean square, or that of a channel which is
    larger than others.
    """
    if kind.bits < 8 or metric.right is None:
        return 0.0
    root = metric.right.double()
    squares = root.square() if root.dim() == 1 else root.square().sum(1)
    usual = 2 * math.log(len(squares) + 1) * float(squares.mean())
    variance = max(usual, float(squares.max())) / (12 * kind.codes[1] ** 2)
    seen = float(root_times(metric.left, matrix.double()).square().sum())
    return metric.scale * variance * seen


def _components(left: Tensor, right: Tensor, kind: Precision, metric: Metric) -> Tensor:
    """What every component of U V adds: (R,)."""
    through = root_times(metric.left, left).double().square().sum(0)  # how U sees a row of V
    behind = times_root(right, metric.right).double().square().sum(1)
    # Of V the components are rows: columns of its transpose, in the transposed metric.
    inputs = Metric(metric.scale, None, metric.right)
    outputs = Metric(metric.scale, metric.left, None)
    rows = expected_by_column(grid(right, kind, inputs).steps.mT, inputs.transposed())
    columns = expected_by_column(grid(left, kind, outputs).steps, outputs)
    return rows * through + columns * behind
