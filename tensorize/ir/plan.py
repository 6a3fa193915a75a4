"""What was chosen for every weight, and what that is predicted to cost."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass, fields
from typing import Any

from tensorize.base import html, printer
from tensorize.base.errors import AnalysisError
from tensorize.base.records import BAD_DATA, by_field, checksum, parse, plain, record
from tensorize.ir.machine import GENERIC
from tensorize.ir.spec import DENSE, MOST_ELEMENTS, Spec

REFIT, POLISH = "refit", "polish"
"""What is done to the cores after the decompositions; a polish comes after a refit."""

NATS, OF_VARIANCE, THE_CALLERS = "nats", "relative squared error", "loss_fn"
"""What a loss to preserve is counted in: KL, shares of the outputs' variance, or the caller's."""

RUINED = {NATS: 1.0, OF_VARIANCE: 0.5}
"""The rise of the loss above which a model is ruined, by what the loss is counted in."""


@dataclass(frozen=True)
class RankPlan:
    """What is done with one site, and why.

    ``predicted_error`` is the relative error of the weight in the metric of the analysis,
    ``predicted_loss`` its share of the predicted rise of the loss (0.0 without a ``loss`` metric).
    ``shared`` names the first of the weights that have their first factor (that of the input) in
    common; that one is counted with it, the others are not. ``reals``: how many real numbers an
    entry is, two where it is complex.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: Spec | None
    predicted_error: float
    predicted_loss: float
    reason: str
    shared: str | None = None
    reals: int = 1

    @property
    def format(self) -> str:
        return DENSE if self.spec is None else self.spec.format

    @property
    def made_as(self) -> Spec | None:
        """What its cores are of before they are put in place: codes as held, else plain ones."""
        if self.spec is None or self.spec.precision is not None:
            return self.spec
        return self.spec.plain

    @property
    def ranks(self) -> tuple[int, ...]:
        return () if self.spec is None else self.spec.ranks

    @property
    def precision(self) -> str | None:
        """What its entries are rounded to, by its name; None where they are not."""
        return None if self.spec is None else self.spec.precision

    @property
    def parameters_before(self) -> int:
        return math.prod(self.shape) * self.reals

    @property
    def parameters_after(self) -> int:
        if self.spec is None:
            return self.parameters_before
        if self.shared not in (None, self.name):
            return math.prod(self.spec.core_shapes[0]) * self.reals
        return self.spec.parameters * self.reals


@dataclass(frozen=True)
class PredictedMetric:
    """A metric of the caller's: its mean over batches for the dense model, what it is expected to
    be, and the 90 % interval of that on as many other data."""

    name: str
    dense: float
    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        value, dense = printer.number(self.value), printer.number(self.dense)
        return f"{self.name} {value} (90 %: {printer.interval(self.interval)}; dense {dense})"


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to give.

    ``loss`` is the rise of the loss to preserve on unseen data (nats for a model with logits,
    squared error relative to the outputs' variance otherwise), ``loss_interval`` its 90 % interval;
    both are ``None`` where the analysis saw no data. ``output_error`` is the largest relative
    error of a site's weight in the metric where there are no data, and the relative error of the
    outputs (a norm) where there are. ``flops`` are per input row of a site, the worst over
    ``batch_sizes``; ``latency`` is the time of all matmuls against the model's parameters, in
    microseconds, for each of those numbers of rows. ``communication``: what tensor-parallel devices
    send for a row, in bytes, if weights of low rank are split by their bottleneck. ``metrics`` are
    the caller's own (``analyze(metrics=)``), in the order in which they were given. ``file``: where
    the budget limits it, the bytes of the file of weights that ``save(coded=True)`` writes, or up
    to 2 % fewer; ``loss`` is that of the model in memory, and the manifest says that of the file.

    Examples:
        >>> predicted = tensorize.report(small).plan.predicted
        >>> low, high = predicted.loss_interval
        >>> low <= predicted.loss <= high
        True
    """

    parameters: int
    bytes: int
    flops: int
    output_error: float
    loss: float | None = None
    loss_interval: tuple[float, float] | None = None
    latency: tuple[float, ...] = ()
    communication: int = 0
    metrics: tuple[PredictedMetric, ...] = ()
    file: int | None = None

    def metric(self, name: str) -> PredictedMetric:
        """One of ``metrics``.

        Raises:
            AnalysisError: there is none of that name.
        """
        for each in self.metrics:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.metrics)
        raise AnalysisError(
            f"no metric {name!r} is predicted",
            way_out=f"one of {known}" if known else "analyse with metrics={name: function}",
        )

    def to_dict(self) -> dict[str, Any]:
        """By field; ``file`` only where there is one, as earlier releases know none."""
        data = plain({f.name: getattr(self, f.name) for f in fields(self)})
        return data if self.file is not None else {k: v for k, v in data.items() if k != "file"}


@dataclass(frozen=True)
class Totals:
    """Size and cost of a whole model; each parameter counts once, ``flops`` are per input row.

    ``latency``: microseconds of its matmuls, for each of a plan's ``batch_sizes``;
    ``communication``: bytes that tensor-parallel devices send for a row.
    """

    parameters: int
    bytes: int
    flops: int
    latency: tuple[float, ...] = ()
    communication: int = 0

    @property
    def costs(self) -> tuple[float, ...]:
        """All of them, in the order of the costs of a point."""
        sizes = self.parameters, self.bytes, self.flops, self.communication
        return (*sizes, self.bytes, *self.latency)  # of a file a share is one of the bytes


@dataclass(frozen=True, eq=False)
class Plan:
    """One choice of formats and ranks for a whole model: hashable, printable, kept as JSON.

    ``fingerprint`` identifies the model and analysis that it was made for; ``refine`` is what will
    be done to the cores, and what ``predicted`` is of; ``gap`` the share of the sum of distortions
    by which a better choice might be better (the duality gap); ``machine`` the one whose figures
    its times are predicted from; ``own_loss`` says that its loss is a ``loss_fn`` of the caller's,
    ``limits_errors`` that its budget limits the error of every weight.

    Examples:
        >>> plan = tensorize.report(small).plan
        >>> tensorize.Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[RankPlan, ...]
    budget: str
    metric: str
    predicted: Prediction
    dense: Totals
    batch_sizes: tuple[int, ...]
    seed: int
    fingerprint: str
    refine: str | None = None
    gap: float = 0.0
    machine: str = GENERIC.name
    notes: tuple[str, ...] = ()
    cache: str | None = None
    own_loss: bool = False
    limits_errors: bool = False

    @property
    def alone(self) -> Plan:
        """The plan without what a kind of plan adds to it, which counts in no comparison."""
        return Plan(*self._values)

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(Plan))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    def _lines(self) -> list[str]:
        """What it says above the weights."""
        after, before = self.predicted, self.dense
        refined = f", refined by a {self.refine}" if self.refine else ""
        lines = [
            f"plan for {self.budget} in the {self.metric} metric{refined}",
            f"parameters {printer.count(before.parameters)} to {printer.count(after.parameters)}, "
            f"FLOPs a row {printer.count(before.flops)} to {printer.count(after.flops)}, "
            f"error {printer.number(after.output_error)}",
        ]
        if after.file is not None:
            lines[-1] += f", a file of {printer.count(after.file)} bytes"
        if after.loss is not None:
            span = printer.interval(after.loss_interval)
            lines[-1] += f", loss {printer.number(after.loss)} (90 %: {span})"
        lines += [str(metric) for metric in after.metrics]
        return lines

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles, and a row for every weight."""
        rows = [
            (
                site.name,
                site.kind,
                printer.shape_text(site.shape),
                printer.format_text(site.format, site.ranks, site.precision),
                printer.count(site.parameters_after),
                printer.number(site.predicted_error),
                site.reason,
            )
            for site in self.sites
        ]
        return ("weight", "kind", "shape", "format", "parameters", "error", "why"), rows

    def _repr_html_(self) -> str:
        return html.table(*self._table(), "; ".join(self._lines()))

    def __str__(self) -> str:
        headers, rows = self._table()
        align: list[printer.Align] = ["left", "left", "keep", "keep", "right", "right", "wrap"]
        lines = [textwrap.fill(line, printer.prose_width()) for line in self._lines()]
        text = "\n".join([*lines, "", printer.table(headers, rows, align=align)])
        return printer.plain(text)

    def to_json(self) -> str:
        """All of it, with a checksum; ``from_json`` reads it."""
        data = plain(by_field(self))
        return json.dumps({**data, "sha256": checksum(data)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            AnalysisError: the text is none, or not what it was.
        """
        try:
            data = parse(text)
            found = data.pop("sha256", None)
            if found is not None and found != checksum(data):
                raise AnalysisError(
                    "the text of the plan was changed: its sha256 is not the one that it says",
                    way_out="what plan.to_json() wrote; without the line of its sha256, a plan "
                    "that was edited is taken as it is",
                )
            plan = record(cls, data)
            plan._check()
        except BAD_DATA as error:
            raise AnalysisError(
                f"the text is no plan: {type(error).__name__}: {error}",
                way_out="what plan.to_json() wrote",
            ) from error
        return plan

    def _check(self) -> None:
        """Raises ValueError for what no plan says."""
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise ValueError("a weight is there twice")
        for site in self.sites:
            if min(site.shape, default=1) < 1 or math.prod(site.shape) > MOST_ELEMENTS:
                raise ValueError(f"{site.name} has the shape {site.shape}")
            if site.spec is not None and math.prod(site.spec.shape) != math.prod(site.shape):
                raise ValueError(f"{site.name} of {site.shape} is to be {site.spec}")
        costs = (
            cost for c in (self.predicted, self.dense) for cost in (c.parameters, c.bytes, c.flops)
        )
        if min(self.batch_sizes, default=1) < 1 or min(costs) < 0:
            raise ValueError("it counts below zero")
        if self.refine not in (None, REFIT, POLISH):
            raise ValueError(f"factors are refined by no {self.refine}")
