"""What a plan does to a user's own metrics: measured on trial plans, predicted for every other.

A trial says what the loss rose by and what the metric then was. Small errors move most metrics by
their size, which is the square root of a squared loss or a divergence: so the change of a metric
over the square root of the rise is interpolated between trials, over the logarithm of the rise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorize.base.errors import AnalysisError
from tensorize.ir.plan import PredictedMetric
from tensorize.ir.sites import Batch

MetricFunction = Callable[[Any, Any, Any], Any]
"""(outputs, batch, dense outputs) → a number."""

_SPREAD = 0.1
"""What interpolation adds to the scatter, relative to the change of a metric (one sigma)."""

_NORMAL_90 = 1.645

Value = tuple[float, float]
"""A mean over batches, and its standard error."""


def value_of(name: str, function: MetricFunction, outputs: Any, batch: Batch, dense: Any) -> float:
    """A metric of one batch.

    Raises:
        AnalysisError: it is no finite number.
    """
    found = function(outputs, batch.given, dense)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = float(found.detach())
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise AnalysisError(
            f"metrics[{name!r}] gave {found!r} for batch {batch.number}, which is no finite number",
            way_out="return a number, such as a mean over the batch",
        )
    return float(found)


def mean_of(values: Sequence[float]) -> Value:
    """The mean over batches, and its standard error; as large as itself where there is one."""
    each = torch.tensor(values, dtype=torch.float64)
    mean = float(each.mean())
    if len(values) < 2:
        return mean, abs(mean)
    return mean, float(each.std() / len(values) ** 0.5)


def predicted_metric(
    name: str,
    dense: Value,
    trials: Sequence[tuple[float, Value]],
    loss: float,
    interval: tuple[float, float],
    student: float = _NORMAL_90,
) -> PredictedMetric:
    """A metric at a rise of the loss, from (rise, value) of trials.

    ``student``: how many standard errors hold 90 %, for so few batches.
    """
    known = sorted((rise, *value) for rise, value in trials if rise > 0)
    if not known or loss <= 0:
        width = student * dense[1]
        return PredictedMetric(name, dense[0], dense[0], (dense[0] - width, dense[0] + width))
    places = np.log([rise for rise, *_ in known])
    slopes = np.array([(value - dense[0]) / math.sqrt(rise) for rise, value, _ in known])
    errors = np.array([error for *_, error in known])

    def change(rise: float) -> float:
        return float(np.interp(math.log(rise), places, slopes)) * math.sqrt(rise)

    moved = change(loss)
    least, most = (change(max(rise, 1e-300)) for rise in interval)
    by_loss = abs(most - least) / (2 * _NORMAL_90)
    of_sample = float(np.interp(math.log(loss), places, errors)) * student / _NORMAL_90
    sigma = math.sqrt(by_loss**2 + (_SPREAD * moved) ** 2 + of_sample**2)
    value, width = dense[0] + moved, _NORMAL_90 * sigma
    low, high = value - width, value + width
    # What every trial moved one way is not expected to move the other.
    if (slopes >= 0).all():
        low = max(low, dense[0] - student * dense[1])
    if (slopes <= 0).all():
        high = min(high, dense[0] + student * dense[1])
    return PredictedMetric(name, dense[0], value, (low, high))


def check_metrics(given: Any) -> Mapping[str, MetricFunction]:
    """What ``metrics=`` is; raises AnalysisError for what is no mapping from names to functions."""
    good = isinstance(given, Mapping) and all(isinstance(name, str) for name in given)
    if not good or not all(callable(function) for function in given.values()):
        raise AnalysisError(
            f"metrics={given!r} is no mapping from names to functions",
            way_out='metrics={"force MAE": lambda outputs, batch, dense: …}, each giving a number',
        )
    return dict(given)
