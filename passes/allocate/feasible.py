"""What of a budget can be met at all, and the nearest value that can."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tensorize.base.errors import BudgetError
from tensorize.ir.plan import Totals
from tensorize.passes.allocate.candidates import Points


def within_error(points: Sequence[Points], error: float) -> list[Points]:
    """Only the points of each weight whose relative error is within the limit, once rounded."""
    worst = max(points, key=lambda p: _rounded_errors(p).min(), default=None)
    if worst is not None and (smallest := _rounded_errors(worst).min()) > error:
        least = smallest * 1.001  # printed with few digits, it must still be enough
        raise BudgetError(
            f"no allowed point has an error within {error:g}: the smallest is {least:.4g}",
            site=worst.site.name,
            way_out=f"error={least:.4g}, or allow 'dense' in formats=",
        )
    return [p.only(np.flatnonzero(_rounded_errors(p) <= error)) for p in points]


def _rounded_errors(points: Points) -> np.ndarray:
    """The relative errors of factors in their own dtype; a dense weight has none.

    Rounding every entry of two factors changes their product by some .2 eps of its size, measured
    on trained weights (the entries' errors are independent of each other and of the truncation).
    """
    if not points.errors.any():
        return points.errors  # dense, and perhaps of a dtype that rounds nothing
    eps = torch.finfo(getattr(torch, points.site.dtype)).eps
    return np.where(points.errors > 0, np.hypot(points.errors, eps / 2), 0.0)


def check_feasible(
    names: Sequence[str],
    points: Sequence[Points],
    caps: np.ndarray,
    overhead: np.ndarray,
    limits: Mapping[str, float],
    dense: Totals,
) -> None:
    whole = (dense.parameters, dense.bytes, dense.flops, *dense.latency)
    for j, name in enumerate(names):
        cost = name.partition("[")[0]
        least = [float(p.costs[:, j].min()) for p in points]
        if sum(least) <= caps[j]:
            continue
        need = math.ceil(sum(least) + overhead[j])
        fixed = sorted(
            ((value, p) for value, p in zip(least, points, strict=True) if p.fixed),
            key=lambda pair: -pair[0],
        )
        blocking = [f"{p.site.name} ({int(v):,}: {p.fixed})" for v, p in fixed[:3] if v > 0]
        if overhead[j]:
            blocking.append(f"biases, norms and other small parameters ({int(overhead[j]):,})")
        share = np.ceil(need / whole[j] * 1e4) / 1e4 if whole[j] else np.inf  # still enough
        short = cost == "params" and share <= 1
        of_dense = (
            f"{need / whole[j]:.4f} of the dense model" if whole[j] else "dense it costs none"
        )
        raise BudgetError(
            f"{cost} cannot be within {limits[name]:,.0f}: the smallest feasible value is "
            f"{need:,} ({of_dense}); in the way: "
            f"{'; '.join(blocking) or 'every weight is at its smallest rank already'}",
            site=fixed[0][1].site.name if fixed else None,
            way_out=f"budget={f'{share:.4f}' if short else f'tensorize.Budget({cost}={need})'}, "
            "or allow more weights to be factorized (include=, exclude=, formats=)",
        )
