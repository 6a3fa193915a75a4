"""What the caller is ready to spend: one budget for the whole model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from fractions import Fraction

from tensorize.base.errors import BudgetError
from tensorize.ir.plan import Totals

_COSTS = ("params", "bytes", "flops", "latency", "communication")


@dataclass(frozen=True)
class Budget:
    """Limits that the result must satisfy, alone or together.

    Args:
        params, bytes, flops, latency: a float in (0, 1] is a share of the dense model, an int an
            absolute value. FLOPs are per input row, matmuls against parameters only, the worst over
            the ``batch_sizes`` of the plan; latency is the predicted time of those matmuls in
            microseconds, and holds at each of the ``batch_sizes``.
        communication: likewise, bytes that a tensor-parallel device sends for one input row in a
            training step, forward and back, where weights of low rank are split by their
            bottleneck; a dense weight counts as if it sent its input, or its output, alone. For
            bytes a step on a mesh there is ``communication_budget`` of a plan of strategies.
        error: largest relative error of any site's weight, in the metric of the analysis.
        loss: largest predicted rise of the loss to preserve (needs calibration data).

    With a limit on costs the predicted distortion is minimised; with ``error`` or ``loss`` alone,
    the number of parameters is, or with a choice of precisions that of bytes.

    Raises:
        BudgetError: an entry is not a positive finite number, or none is given.
    """

    params: float | int | None = None
    bytes: float | int | None = None
    flops: float | int | None = None
    latency: float | int | None = None
    communication: float | int | None = None
    error: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise BudgetError(
                "a budget needs at least one limit",
                way_out="for example Budget(params=0.1) or Budget(error=0.05)",
            )
        for name, value in given.items():
            _check(name, value)

    @classmethod
    def of(cls, value: float | Budget) -> Budget:
        """A float in (0, 1] as the share of parameters kept; a Budget as it is."""
        if isinstance(value, Budget):
            return value
        if not isinstance(value, float):
            raise BudgetError(
                f"budget must be a float in (0, 1] or a tensorize.Budget, got {value!r}",
                way_out="0.1 keeps at most 10 % of the parameters; Budget(params=1_000_000) is "
                "an absolute number",
            )
        return cls(params=value)

    def limits(self, dense: Totals) -> dict[str, float]:
        """The absolute limit of every cost that is limited, given the dense model's own.

        The time at the k-th of the batch sizes is called ``latency[k]``.
        """
        whole = {"params": dense.parameters, "bytes": dense.bytes, "flops": dense.flops}
        whole["communication"] = dense.communication
        limits: dict[str, float] = {}
        if self.latency is not None:
            for k, time in enumerate(dense.latency):
                share = isinstance(self.latency, float)
                limits[f"latency[{k}]"] = self.latency * time if share else self.latency
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, float):
                # The decimal that was written, not its nearest float: 0.29 of 100 allows 29.
                limits[name] = math.floor(Fraction(str(float(value))) * whole[name])
            elif value is not None:
                limits[name] = value
        return limits

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={value:,}" for name, value in given if value is not None)


def _check(name: str, value: object) -> None:
    way_out = (
        f"a float in (0, 1] is a share of the dense model, an int an absolute value: {name}=0.1"
        if name in _COSTS
        else f"for example Budget({name}=0.05)"
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{name} must be a number, got {value!r}", way_out=way_out)
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{name} must be positive and finite, got {value!r}", way_out=way_out)
    if name in _COSTS and isinstance(value, float) and value > 1:
        raise BudgetError(
            f"{name}={value!r} is a float above 1, and a float is a share of the dense model",
            way_out=f"give a share in (0, 1], or the absolute value as an int: {name}={value:.0f}",
        )


_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if len(unit) == 1 and unit != "B"}
_UNITS |= {f"{unit}iB": 2 ** (10 * k) for k, unit in enumerate("KMGT", 1)}


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes, or text such as ``"4GB"``, ``"512 MiB"``, ``"1.5G"``; None is no limit.

    Raises:
        BudgetError: it is neither, or not positive.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
    size = units.get(found[2].lower()) if found and isinstance(value, str) else None
    if found is None or size is None or int(float(found[1]) * size) < 1:
        raise BudgetError(
            f"max_memory={value!r} is no size", way_out='a number of bytes, or text such as "4GB"'
        )
    return int(float(found[1]) * size)
