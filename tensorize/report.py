"""What was done to a model: site by site, in total, and how it came about.

``str(report)`` is a table for a terminal, ``report.to_html(path)`` one self-contained page,
``report.to_dict()`` JSON that ``Report.from_dict`` reads back exactly. All of it is frozen data;
the pipeline fills it, nothing here computes a figure that is not a sum or a share.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, overload

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize import files, printer
from tensorize.errors import TensorizeError
from tensorize.ir import DENSE, Plan, Prediction, RankPlan, Totals
from tensorize.tensors import unwrapped

WIDTH = 100
NAME_WIDTH = 24  # a name of this length stands in a table of sites in full
SITE_HEADERS = ("kind", "shape", "format", "parameters", "error", "actual", "why")


@dataclass(frozen=True)
class RunsBy:
    """What a weight runs by for some numbers of rows, from ``first`` to ``last`` (None: any more).

    ``winner`` is ``"library"`` or the family of a kernel, ``ratio`` the kernel's time over that of
    the library's matmuls where it was measured on this machine, ``why`` what decided otherwise.
    """

    first: int
    last: int | None
    winner: str
    ratio: float | None = None
    why: str = ""

    def __str__(self) -> str:
        rows = f"{self.first} rows and more" if self.last is None else f"up to {self.last} rows"
        timed = f"the kernel takes {self.ratio or 0:.2f} of the library's time"
        why = self.why if self.ratio is None else timed
        return f"{rows}: {self.winner}{f' ({why})' if why else ''}"


@dataclass(frozen=True)
class SiteReport:
    """What became of one parameter.

    ``format`` is ``"dense"``, ``"low_rank"``, ``"tt"`` or ``"block"``. ``predicted_error`` is the
    relative error of the weight in the plan's metric, ``actual_error`` the same measured on the
    cores (0.0 when dense), ``predicted_loss`` the site's share of the predicted rise of the loss.
    ``runs_by`` is empty where a weight runs by torch operations whatever the rows.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    format: str
    ranks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    predicted_error: float
    actual_error: float
    predicted_loss: float
    reason: str
    runs_by: tuple[RunsBy, ...] = ()

    @classmethod
    def of(
        cls, choice: RankPlan, aliases: tuple[str, ...], actual_error: float = 0.0
    ) -> SiteReport:
        """What a plan said of a parameter, and the error that was measured."""
        names = {f.name for f in fields(cls)} - {"aliases", "actual_error", "runs_by"}
        planned = {name: getattr(choice, name) for name in names}
        return cls(aliases=aliases, actual_error=actual_error, **planned)

    @property
    def share(self) -> float:
        """Parameters that are left, as a share."""
        return _share(self.parameters_after, self.parameters_before)

    def to_dict(self) -> dict[str, Any]:
        return encode(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteReport:
        found = _tuples(decode(data), "aliases", "shape", "ranks")
        found["runs_by"] = tuple(RunsBy(**each) for each in found.get("runs_by", ()))
        return cls(**found)


@dataclass(frozen=True)
class Shares:
    """What is left of each figure, 1.0 for all of it."""

    parameters: float
    bytes: float
    flops: float


@dataclass(frozen=True)
class ReportTotals:
    """The whole model before and after, parameters that are no site included."""

    before: Totals
    after: Totals

    @property
    def share(self) -> Shares:
        """After over before."""
        return Shares(
            **{
                f.name: _share(getattr(self.after, f.name), getattr(self.before, f.name))
                for f in fields(Shares)
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportTotals:
        sides = (_tuples(data[side], "latency") for side in ("before", "after"))
        return cls(*(Totals(**side) for side in sides))


@dataclass(frozen=True)
class CurvePoint(Prediction):
    """What one budget, a share of the parameters, is predicted to give."""

    budget: float = field(kw_only=True)

    @property
    def quality(self) -> float:
        """The predicted rise of the loss, the error of the outputs where there is none."""
        return self.output_error if self.loss is None else self.loss


@dataclass(frozen=True)
class Curve(Sequence[CurvePoint]):
    """Predicted quality, size and cost over budgets: a sequence of points that prints a table."""

    points: tuple[CurvePoint, ...]
    metric: str

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> CurvePoint: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[CurvePoint, ...]: ...
    def __getitem__(self, index: int | slice) -> CurvePoint | tuple[CurvePoint, ...]:
        return self.points[index]

    def __iter__(self) -> Iterator[CurvePoint]:
        return iter(self.points)

    @property
    def quality_name(self) -> str:
        """What ``CurvePoint.quality`` is for the points of this curve."""
        known = any(point.loss is not None for point in self.points)
        return "predicted rise of the loss" if known else "predicted error"

    def __str__(self) -> str:
        rows = [
            (
                printer.percent(point.budget),
                printer.count(point.parameters),
                printer.bytes_(point.bytes),
                printer.count(point.flops),
                printer.number(point.output_error),
                printer.number(point.loss),
                printer.interval(point.loss_interval),
                ", ".join(printer.seconds(1e-6 * each) for each in point.latency),
            )
            for point in self.points
        ]
        headers = (
            *("budget", "parameters", "bytes", "FLOPs a row", "error", "loss", "90 % interval"),
            "times",
        )
        align: list[printer.Align] = ["right"] * len(headers)
        body = printer.table(headers, rows, width=WIDTH, align=align)
        return f"predicted by budget, metric {self.metric}\n\n{body}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the curve with matplotlib, in the format that the suffix of ``path`` names.

        Raises:
            TensorizeError: matplotlib is not installed, or the directory does not exist.
        """
        target = files.writable(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise TensorizeError(
                "plotting a curve needs matplotlib, which is not installed",
                way_out="pip install matplotlib, or look at the curve in report.to_html(path)",
            ) from error
        shown = [point for point in self.points if point.quality > 0]
        budgets = [100 * point.budget for point in shown]
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        color = printer.FORMAT_COLORS["low_rank"][0]
        band = [(100 * p.budget, *p.loss_interval) for p in shown if p.loss_interval is not None]
        if band:
            floor = 0.1 * min(point.quality for point in shown)
            x, low, high = zip(*band, strict=True)
            low = [max(value, floor) for value in low]
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0, label="90 % interval")
        axes.plot(budgets, [point.quality for point in shown], color=color, marker="o")
        if shown:
            axes.set_yscale("log")
        axes.set_xlabel("parameters kept (%)")
        axes.set_ylabel(self.quality_name)
        axes.set_title(f"metric: {self.metric}")
        axes.grid(alpha=0.25)
        if band:
            axes.legend(frameon=False)
        figure.savefig(target)

    def to_dict(self) -> dict[str, Any]:
        return encode({"metric": self.metric, "points": [asdict(p) for p in self.points]})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        points = (_tuples(p, "loss_interval", "latency") for p in decode(data)["points"])
        return cls(tuple(CurvePoint(**point) for point in points), data["metric"])


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline: how long it took, and in one line what it did."""

    name: str
    seconds: float
    summary: str


@dataclass(frozen=True)
class Report:
    """The plan, what came of it, and the record of how.

    ``notes`` are warnings, things that were skipped, and limits. ``backend`` is what the caller
    asked weights to run by, ``fused`` what launches of compiled graphs took in, and around which
    weights. ``environment`` is pairs of names and values: versions, machine, seed.
    ``measured_loss`` and ``measured_error`` are the rise of the loss and the error of the outputs
    where a compile measured them.
    """

    plan: Plan
    sites: tuple[SiteReport, ...]
    totals: ReportTotals
    curve: Curve | None = None
    history: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    backend: str = "auto"
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    measured_loss: float | None = None
    measured_error: float | None = None

    @property
    def factorized(self) -> tuple[SiteReport, ...]:
        """The sites that did not stay dense."""
        return tuple(site for site in self.sites if site.format != DENSE)

    @property
    def running(self) -> list[str]:
        """What weights run by, a line for those of one answer."""
        alike: dict[tuple[RunsBy, ...], list[str]] = {}
        for site in self.sites:
            if site.runs_by:
                alike.setdefault(site.runs_by, []).append(site.name)
        return [_named("; ".join(map(str, runs_by)), names) for runs_by, names in alike.items()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data: plain dicts, lists, strings and finite numbers."""
        return {
            "plan": encode(json.loads(self.plan.to_json())),
            "sites": [site.to_dict() for site in self.sites],
            "totals": self.totals.to_dict(),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "history": [encode(asdict(stage)) for stage in self.history],
            "notes": list(self.notes),
            "backend": self.backend,
            "fused": [[what, list(names)] for what, names in self.fused],
            "environment": [list(pair) for pair in self.environment],
            "measured_loss": encode(self.measured_loss),
            "measured_error": encode(self.measured_error),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` described, equal to it in every field."""
        curve = data["curve"]
        return cls(
            plan=Plan.from_json(json.dumps(decode(data["plan"]))),
            sites=tuple(SiteReport.from_dict(site) for site in data["sites"]),
            totals=ReportTotals.from_dict(data["totals"]),
            curve=None if curve is None else Curve.from_dict(curve),
            history=tuple(Stage(**decode(stage)) for stage in data["history"]),
            notes=tuple(data["notes"]),
            backend=data.get("backend", "auto"),
            fused=tuple((what, tuple(names)) for what, names in data.get("fused", ())),
            environment=tuple((name, value) for name, value in data["environment"]),
            measured_loss=decode(data["measured_loss"]),
            measured_error=decode(data["measured_error"]),
        )

    def __str__(self) -> str:
        kept = len(self.sites) - len(self.factorized)
        head = (
            f"tensorize: {len(self.sites)} sites, {len(self.factorized)} factorized, {kept} dense; "
            f"budget {self.plan.budget}. Errors are relative, of a site's weight, in the metric "
            f"{self.plan.metric}: predicted, then measured."
        )
        reasons = list(dict.fromkeys(site.reason for site in self.sites))
        blocks = [
            "\n".join(textwrap.wrap(head, WIDTH)),
            _site_table(self.sites, reasons) if self.sites else "no site was found",
            _totals_table(self.totals, self.plan.batch_sizes),
            "\n".join(_hanging(name, text) for name, text in self._quality()),
            *_listing("runs by", self.running),
            *_listing("fused in compiled graphs", [_named(*each) for each in self.fused]),
            *_listing("why", [f"[{k}] {reason}" for k, reason in enumerate(reasons, 1)]),
            *_listing("notes", [f"• {note}" for note in self.notes]),
        ]
        return "\n\n".join(blocks)

    def _quality(self) -> Iterator[tuple[str, str]]:
        """What is known of the quality: predictions, and what was measured."""
        predicted, metric = self.plan.predicted, f", metric {self.plan.metric}"
        error = printer.number(predicted.output_error)
        if predicted.loss is not None:
            interval = predicted.loss_interval
            span = f", 90 %: {printer.interval(interval)}" if interval is not None else ""
            loss = f"{printer.number(predicted.loss)}{span}{metric}"
            yield "predicted rise of the loss", loss + _measured(self.measured_loss)
            yield "predicted error of the outputs", error + _measured(self.measured_error)
        else:
            if self.measured_loss is not None:
                yield "measured rise of the loss", printer.number(self.measured_loss)
            yield "predicted largest error of a site", error + metric
            if self.measured_error is not None:
                yield "measured error of the outputs", printer.number(self.measured_error)
        if self.plan.refine is not None:
            how = {"refit": "a refit", "polish": "a refit and a polish"}[self.plan.refine]
            yield "factors refined by", f"{how}, of which the prediction is"
        if self.plan.gap > 0:
            yield "ranks", f"within {100 * self.plan.gap:.2g} % of the best choice there is"
        if self.factorized:
            worst = max(self.factorized, key=lambda site: site.actual_error)
            name = printer.shorten_middle(worst.name, 60)
            text = f"{printer.number(worst.actual_error)} ({name})"
            yield "measured error of a site, at most", text

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one page that needs no network and no other file.

        Raises:
            TensorizeError: the directory of ``path`` does not exist or cannot be written.
        """
        from tensorize import page  # which draws what is defined here

        files.write_text(path, page.render(self))


# -------------------------------------------------------------------------------- kept on a model


def attach(model: nn.Module, found: Report) -> None:
    """Keep a report on the model that it is of."""
    model.__dict__["_tensorize"] = found


_fused: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the launch of a compiled graph took in, by a core of each of its weights."""


def note_fused(core: Tensor, what: str) -> None:
    """Remember what the launch of a weight took in; reports of its model say it."""
    _fused[core] = what


def _fused_in(model: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if (what := _fused.get(parameter)) is not None:
            name = name.rpartition(".")[0]  # of the module that holds the core
            found.setdefault(what, []).append(name.removesuffix(".second").removesuffix("_cores"))
    return tuple((what, tuple(names)) for what, names in found.items())


def detach(model: nn.Module) -> None:
    """Let a model know nothing of what was done to it."""
    model.__dict__.pop("_tensorize", None)


def known_report(model: nn.Module) -> Report | None:
    """The report of a compressed model; None for any other."""
    found = model.__dict__.get("_tensorize")
    return found if isinstance(found, Report) else None


def report(model: nn.Module) -> Report:
    """What was done to a compiled model: ``str()`` is a table, ``to_html(path)`` a page.

    Raises:
        TensorizeError: the model was not made by tensorize.
    """
    if not isinstance(model, nn.Module):
        raise TensorizeError(
            f"a {type(model).__name__} has no report",
            way_out="tensorize.report(tensorize.load(directory)), or `tensorize report directory`",
        )
    model = unwrapped(model)
    found = known_report(model)
    if found is None:
        raise TensorizeError(
            "the model was not made by tensorize",
            way_out="model = tensorize.compile(model, budget=0.1)",
        )
    return replace(found, fused=_fused_in(model))


# ------------------------------------------------------------------------------------------ JSON


def _share(after: float, before: float) -> float:
    return after / before if before else 1.0


def encode(value: Any) -> Any:
    """``value`` as strict JSON data: tuples as lists, floats that JSON does not know as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode(value: Any, mark: str = "float") -> Any:
    """JSON data with their floats: ``{mark: "inf"}`` stands for one that JSON has no number for."""
    if isinstance(value, Mapping):
        if value.keys() == {mark}:
            return float(value[mark])
        return {key: decode(item, mark) for key, item in value.items()}
    return [decode(item, mark) for item in value] if isinstance(value, list) else value


def _tuples(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: tuple(v) if k in names and v is not None else v for k, v in data.items()}


# ------------------------------------------------------------------------------------------ text


def _site_table(sites: Sequence[SiteReport], reasons: Sequence[str]) -> str:
    """One short row a site; reasons are numbered, because many sites share one."""
    # A last part that all names share tells nothing, and long names need its room.
    tails = {site.name.rpartition(".")[2] for site in sites}
    tail = f".{tails.pop()}" if len(tails) == 1 and len(sites) > 1 else ""
    if max(len(site.name) for site in sites) <= NAME_WIDTH:
        tail = ""
    rows: list[tuple[str, ...]] = []
    for site in sites:
        dense = site.format == DENSE
        before, after = map(printer.count, (site.parameters_before, site.parameters_after))
        rows.append(
            (
                site.name.removesuffix(tail),
                site.kind,
                printer.shape_text(site.shape),
                printer.format_text(site.format, site.ranks),
                before if dense else f"{before} → {after}",
                "–" if dense else printer.number(site.predicted_error, 2),
                "–" if dense else printer.number(site.actual_error, 2),
                f"[{reasons.index(site.reason) + 1}]",
            )
        )
    return printer.table(
        (f"site (…{tail})" if tail else "site", *SITE_HEADERS),
        rows,
        width=WIDTH,
        align=["left", "end", "keep", "keep", "keep", "right", "right", "right"],
    )


def _totals_table(totals: ReportTotals, batch_sizes: Sequence[int]) -> str:
    rows: list[tuple[str, ...]] = []
    for title, name, text in (
        ("parameters", "parameters", printer.count),
        ("bytes", "bytes", printer.bytes_),
        ("FLOPs a row", "flops", printer.count),
    ):
        sides = (totals.before, totals.after, totals.share)
        before, after, share = (getattr(side, name) for side in sides)
        rows.append((title, text(before), text(after), printer.percent(share)))
    times = zip(batch_sizes, totals.before.latency, totals.after.latency, strict=False)
    for count, before, after in times:
        title = f"µs at {count} row{'s' * (count > 1)}, predicted"
        share = printer.percent(_share(after, before))
        rows.append((title, printer.number(before), printer.number(after), share))
    align: list[printer.Align] = ["left", "right", "right", "right"]
    return printer.table(("total", "before", "after", "share"), rows, width=WIDTH, align=align)


def _named(what: str, names: Sequence[str]) -> str:
    """What holds for some weights, with the name of the first."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {what}"


def _measured(value: float | None) -> str:
    return "" if value is None else f"; measured {printer.number(value)}"


def _hanging(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", WIDTH, subsequent_indent="  ")


def _listing(title: str, items: Sequence[str]) -> Iterator[str]:
    """A titled list, nothing for an empty one."""
    if not items:
        return
    lines = [
        textwrap.fill(i, WIDTH, initial_indent="  ", subsequent_indent="      ") for i in items
    ]
    yield "\n".join([title, *lines])
