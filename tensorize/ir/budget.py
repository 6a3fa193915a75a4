"""What the caller is ready to spend: one budget for the whole model."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from tensorize.base.errors import BudgetError
from tensorize.ir.plan import NATS, OF_VARIANCE, Totals

_COSTS = ("params", "bytes", "stored", "flops", "latency", "communication", "file")
_RELATIVE = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s+relative\s*")

AUTO = "auto"
"""A budget in place of one: the smallest model that is predicted to lose next to nothing."""

AUTO_LOSSES = {NATS: 0.02, OF_VARIANCE: 0.01}
"""What that is, by what a loss is counted in."""


@dataclass(frozen=True)
class Budget:
    """Limits that the result must satisfy, alone or together.

    Args:
        params, bytes, flops, latency: a float in (0, 1] is a share of the dense model, an int an
            absolute value. FLOPs are per input row, matmuls against parameters only, the worst over
            the ``batch_sizes`` of the plan; latency is the predicted time of those matmuls in
            microseconds, and holds at each of the ``batch_sizes``.
        stored: as ``bytes``, which are what the result holds in memory; but what is packed to run
            fast does not count, as it is in no file: weights of fewer than eight bits are then held
            by a CPU as eight, too, once they have run.
        communication: as those, bytes that a tensor-parallel device sends for one input row in a
            training step, forward and back, where weights of low rank are split by their
            bottleneck; a dense weight counts as if it sent its input, or its output, alone. For
            bytes a step on a mesh there is ``communication_budget`` of a plan of strategies.
        error: largest relative error of any site's weight, in the metric of the analysis.
        loss: largest predicted rise of the loss to preserve (needs calibration data).
        file: of the files of weights, which may be coded in fewer bits than memory holds: a share
            of the dense model's bytes, or an int of bytes. For ``tensorize.save(coded=)``; of a
            plan it is what ``save(coded=True)`` codes at, and ranks are those that lose least in
            such a file, within the other limits. A limit on the loss is then one of the file's.
        entry_error: largest error of any entry of any stored tensor, a float, or as
            ``"1e-3 relative"`` a share of each tensor's range. For ``tensorize.save(coded=)``.

    With a limit on costs the predicted distortion is minimised; with ``error`` or ``loss`` alone,
    the number of parameters is, or with a choice of precisions that of bytes.

    Raises:
        BudgetError: an entry is not a positive finite number, or none is given.

    Examples:
        >>> str(tensorize.Budget(params=0.5, loss=0.01))
        'params=0.5, loss=0.01'
        >>> tensorize.Budget.of("10MB")
        Budget(params=None, bytes=10000000, flops=None, ...)
    """

    params: float | int | None = None
    bytes: float | int | None = None
    flops: float | int | None = None
    latency: float | int | None = None
    error: float | None = None
    loss: float | None = None
    stored: float | int | None = None
    communication: float | int | None = None
    file: float | int | None = None
    entry_error: float | str | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise BudgetError(
                "a budget needs at least one limit",
                way_out="for example Budget(params=0.1) or Budget(error=0.05)",
            )
        for name, value in given.items():
            if name == "entry_error":
                entry_bound(value)
            else:
                _check(name, value)
        if self.bytes is not None and self.stored is not None:
            raise BudgetError(
                "bytes= and stored= limit the same",
                way_out="bytes= for what is held in memory, stored= for what is without packs",
            )

    @classmethod
    def of(cls, value: float | str | Budget) -> Budget:
        """A float in (0, 1] as the share of parameters kept, text as it says; a Budget as it is."""
        value = as_written(value)
        if isinstance(value, Budget):
            return value
        if isinstance(value, list | tuple):
            raise BudgetError(
                f"budget={value!r} is several budgets, and a model is compiled to one",
                way_out="tensorize.analyze(model).curve([0.25, 0.5]) predicts what each would give",
            )
        if not isinstance(value, float):
            raise BudgetError(
                f"budget must be a float in (0, 1] or a tensorize.Budget, got {value!r}",
                way_out="0.1 or '10%' keeps at most 10 % of the parameters; '10MB' and "
                "Budget(params=1_000_000) are absolute",
            )
        return cls(params=value)

    @property
    def of_bytes(self) -> Budget:
        """The same limits by the names of what plans cost."""
        return self if self.stored is None else replace(self, bytes=self.stored, stored=None)

    def check_of_plan(self) -> None:
        """Raises BudgetError for a limit that no plan keeps, but ``save`` alone."""
        if self.entry_error is not None:
            raise BudgetError(
                f"{self} limits what is saved, and not what is compiled",
                way_out=f"tensorize.save(model, directory, coded=tensorize.Budget({self}))",
            )

    def limits(self, dense: Totals) -> dict[str, float]:
        """The absolute limit of every cost that is limited, given the dense model's own.

        The time at the k-th of the batch sizes is called ``latency[k]``.
        """
        whole = {"params": dense.parameters, "bytes": dense.bytes, "flops": dense.flops}
        whole |= {"communication": dense.communication, "file": dense.bytes}
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
        return ", ".join(_said(name, value) for name, value in given if value is not None)


def entry_bound(value: float | str) -> tuple[float, bool]:
    """The number that ``entry_error`` is, and whether it is a share of each tensor's range.

    Raises:
        BudgetError: it is none.
    """
    found = _RELATIVE.fullmatch(value) if isinstance(value, str) else None
    if found is not None or not isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(found[1]) if found else value
            _check("entry_error", number)
            return float(number), found is not None
    raise BudgetError(
        f"entry_error={value!r} is no error",
        way_out='a positive float, or a share of each tensor\'s range such as "1e-3 relative"',
    )


def _said(name: str, value: float | str) -> str:
    return f"{name}={value}" if isinstance(value, str) else f"{name}={value:,}"


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
_SIZES = {unit.lower(): size for unit, size in _UNITS.items()}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")


def as_written(value: Any) -> Any:
    """A share or a size that is written as text, ``"50%"`` or ``"10MB"``, as a float or a Budget.

    Anything else is given back as it is.
    """
    if not isinstance(value, str):
        return value
    share = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", value)
    if share is not None:
        return float(Fraction(share[1]) / 100)  # "29%" is 0.29, and not the float beside it
    size = _size(value)
    return value if size is None else Budget(bytes=size)


def _size(text: str) -> int | None:
    """Bytes written with their unit, which a number alone has not."""
    found = _SIZE.fullmatch(text)
    if found is None or not found[2] or found[2].lower() not in _SIZES:
        return None
    return int(float(found[1]) * _SIZES[found[2].lower()])


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes, or text such as ``"4GB"``, ``"512 MiB"``, ``"1.5G"``; None is no limit.

    Raises:
        BudgetError: it is neither, or not positive.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    size = _SIZES.get(found[2].lower()) if found else None
    if found is None or size is None or int(float(found[1]) * size) < 1:
        raise BudgetError(
            f"max_memory={value!r} is no size", way_out='a number of bytes, or text such as "4GB"'
        )
    return int(float(found[1]) * size)
