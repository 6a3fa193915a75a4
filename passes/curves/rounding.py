"""What a weight loses by integers of a few bits, in each of its forms, without rounding it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.algebra.quantise import expected, expected_by_column, grid, pivots
from tensorize.formats.low_rank import largest_that_pays
from tensorize.ir.precision import INTEGERS, Precision


@dataclass(frozen=True)
class Rounding:
    """What one precision adds to the distortion of a weight.

    ``dense`` of the matrix itself; ``low_rank[r]`` of its factors of rank r. Each of their
    components adds what its column of U and its row of V lose, as the other factor sees it.
    """

    precision: str
    dense: float
    low_rank: Tensor


def roundings(
    weight: Tensor, metrics: Sequence[Metric], precisions: Sequence[str]
) -> tuple[Rounding, ...]:
    """Those of a matrix (M, N), or of a stack of them as a whole, at least in float32."""
    if not precisions or weight.is_complex() or any(metric.apart for metric in metrics):
        return ()
    metric = average(metrics)
    matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
    m, n = matrices.shape[1:]
    factors = [best_factors(matrix, metric, largest_that_pays(m, n)) for matrix in matrices]
    down, across = pivots(metric, matrices[0])
    found = []
    for kind in (INTEGERS[name] for name in precisions):
        steps = (grid(matrix, kind, metric).steps for matrix in matrices)
        dense = sum(expected(each, metric.scale, down, across) for each in steps)
        parts = [_components(*pair, kind, metric, down, across) for pair in factors]
        each = metric.scale * torch.stack(parts).sum(0)
        sums = torch.cat([each.new_zeros(1), each.cumsum(0)])
        rest = sums[-1].expand(min(m, n) + 1 - len(sums))
        found.append(Rounding(kind.name, dense, torch.cat([sums, rest]).cpu()))
    return tuple(found)


def _components(
    left: Tensor, right: Tensor, kind: Precision, metric: Metric, down: Tensor, across: Tensor
) -> Tensor:
    """What every component of U V adds: (R,)."""
    through = root_times(metric.left, left).double().square().sum(0)  # how U sees a row of V
    behind = times_root(right, metric.right).double().square().sum(1)
    # Of V the components are rows: columns of its transpose.
    inputs = Metric(metric.scale, None, metric.right)
    outputs = Metric(metric.scale, metric.left, None)
    rows = expected_by_column(grid(right, kind, inputs).steps.mT, across)
    columns = expected_by_column(grid(left, kind, outputs).steps, down)
    return rows * through + columns * behind
