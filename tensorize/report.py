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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import jinja2
import markupsafe

from tensorize import printer
from tensorize.errors import TensorizeError
from tensorize.ir import DENSE, Plan

WIDTH = 100
NAME_WIDTH = 24  # a name of this length stands in a table of sites in full
SITE_HEADERS = ("kind", "shape", "format", "parameters", "error", "actual", "why")


@dataclass(frozen=True)
class SiteReport:
    """What became of one parameter.

    ``format`` is ``"dense"``, ``"low_rank"``, ``"tt"`` or ``"block"``. ``predicted_error`` is the
    relative error of the weight in the plan's metric, ``actual_error`` the same measured on the
    cores (0.0 when dense), ``predicted_loss`` the site's share of the predicted rise of the loss.
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

    @property
    def share(self) -> float:
        """Parameters that are left, as a share."""
        return _share(self.parameters_after, self.parameters_before)

    def to_dict(self) -> dict[str, Any]:
        return _encode(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteReport:
        return cls(**_tuples(_decode(data), "aliases", "shape", "ranks"))


@dataclass(frozen=True)
class Figures:
    """Size and cost of a model; each parameter counts once, ``flops`` are per input row."""

    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Shares:
    """What is left of each figure, 1.0 for all of it."""

    parameters: float
    bytes: float
    flops: float


@dataclass(frozen=True)
class ReportTotals:
    """The whole model before and after, parameters that are no site included."""

    before: Figures
    after: Figures

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
        return cls(Figures(**data["before"]), Figures(**data["after"]))


@dataclass(frozen=True)
class CurvePoint:
    """What one budget is predicted to give.

    ``budget`` is a share of the parameters, ``output_error``, ``loss`` and ``loss_interval`` are as
    in ``tensorize.ir.Prediction``.
    """

    budget: float
    parameters: int
    bytes: int
    flops: int
    output_error: float
    loss: float | None = None
    loss_interval: tuple[float, float] | None = None

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
                _interval_text(point.loss_interval),
            )
            for point in self.points
        ]
        headers = ("budget", "parameters", "bytes", "FLOPs a row", "error", "loss", "90 % interval")
        align: list[printer.Align] = ["right"] * len(headers)
        body = printer.table(headers, rows, width=WIDTH, align=align)
        return f"predicted by budget, metric {self.metric}\n\n{body}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the curve with matplotlib, in the format that the suffix of ``path`` names.

        Raises:
            TensorizeError: matplotlib is not installed, or the directory does not exist.
        """
        target = _writable(path)
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
        return _encode({"metric": self.metric, "points": [asdict(p) for p in self.points]})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        points = (_tuples(point, "loss_interval") for point in _decode(data)["points"])
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

    ``notes`` are warnings, things that were skipped, and limits. ``environment`` is pairs of names
    and values: versions, machine, seed. ``measured_loss`` and ``measured_error`` are the rise of
    the loss and the error of the outputs where a compile measured them.
    """

    plan: Plan
    sites: tuple[SiteReport, ...]
    totals: ReportTotals
    curve: Curve | None = None
    history: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    measured_loss: float | None = None
    measured_error: float | None = None

    @property
    def factorized(self) -> tuple[SiteReport, ...]:
        """The sites that did not stay dense."""
        return tuple(site for site in self.sites if site.format != DENSE)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data: plain dicts, lists, strings and finite numbers."""
        return {
            "plan": _encode(json.loads(self.plan.to_json())),
            "sites": [site.to_dict() for site in self.sites],
            "totals": self.totals.to_dict(),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "history": [_encode(asdict(stage)) for stage in self.history],
            "notes": list(self.notes),
            "environment": [list(pair) for pair in self.environment],
            "measured_loss": _encode(self.measured_loss),
            "measured_error": _encode(self.measured_error),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` described, equal to it in every field."""
        curve = data["curve"]
        return cls(
            plan=Plan.from_json(json.dumps(_decode(data["plan"]))),
            sites=tuple(SiteReport.from_dict(site) for site in data["sites"]),
            totals=ReportTotals.from_dict(data["totals"]),
            curve=None if curve is None else Curve.from_dict(curve),
            history=tuple(Stage(**_decode(stage)) for stage in data["history"]),
            notes=tuple(data["notes"]),
            environment=tuple((name, value) for name, value in data["environment"]),
            measured_loss=_decode(data["measured_loss"]),
            measured_error=_decode(data["measured_error"]),
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
            _totals_table(self.totals),
            "\n".join(_hanging(name, text) for name, text in self._quality()),
            *_listing("why", [f"[{k}] {reason}" for k, reason in enumerate(reasons, 1)]),
            *_listing("notes", [f"• {note}" for note in self.notes]),
        ]
        return "\n\n".join(blocks)

    def _quality(self) -> Iterator[tuple[str, str]]:
        """What is known of the quality: predictions, and what was measured."""
        predicted = self.plan.predicted
        if predicted.loss is not None:
            interval = predicted.loss_interval
            span = f", 90 %: {_interval_text(interval)}" if interval is not None else ""
            measured = self._measured(self.measured_loss)
            text = f"{printer.number(predicted.loss)}{span}, metric {self.plan.metric}{measured}"
            yield "predicted rise of the loss", text
        elif self.measured_loss is not None:
            yield "measured rise of the loss", printer.number(self.measured_loss)
        name = "error of the outputs" if predicted.loss is not None else "largest error of a site"
        measured = self._measured(self.measured_error) if predicted.loss is not None else ""
        metric = "" if predicted.loss is not None else f", metric {self.plan.metric}"
        text = f"{printer.number(predicted.output_error)}{metric}{measured}"
        yield f"predicted {name}", text
        if predicted.loss is None and self.measured_error is not None:
            yield "measured error of the outputs", printer.number(self.measured_error)
        if self.factorized:
            worst = max(self.factorized, key=lambda site: site.actual_error)
            name = printer.shorten_middle(worst.name, 60)
            text = f"{printer.number(worst.actual_error)} ({name})"
            yield "measured error of a site, at most", text

    @staticmethod
    def _measured(value: float | None) -> str:
        return "" if value is None else f"; measured {printer.number(value)}"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one page that needs no network and no other file.

        Raises:
            TensorizeError: the directory of ``path`` does not exist or cannot be written.
        """
        write_text(path, _environment().get_template("report.html.j2").render(_page(self)))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file at once: a reader sees the old one or the new one, never a part.

    Raises:
        TensorizeError: the directory does not exist or cannot be written.
    """
    target = _writable(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        raise TensorizeError(
            f"{target} cannot be written: {error.strerror or error}",
            way_out="choose a file in a directory that you may write to",
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _writable(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise TensorizeError(
            f"{target} cannot be written: the directory {target.parent} does not exist",
            way_out="create it first, or choose another path",
        )
    return target


# ------------------------------------------------------------------------------------------ JSON


def _share(after: float, before: float) -> float:
    return after / before if before else 1.0


def _encode(value: Any) -> Any:
    """``value`` as strict JSON data: tuples as lists, floats that JSON does not know as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _tuples(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: tuple(v) if k in names and v is not None else v for k, v in data.items()}


# ------------------------------------------------------------------------------------------ text


def _interval_text(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{printer.number(interval[0])} to {printer.number(interval[1])}"


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


def _totals_table(totals: ReportTotals) -> str:
    share = totals.share
    rows = [
        (title, text(before), text(after), printer.percent(part))
        for title, text, before, after, part in (
            (
                "parameters",
                printer.count,
                totals.before.parameters,
                totals.after.parameters,
                share.parameters,
            ),
            ("bytes", printer.bytes_, totals.before.bytes, totals.after.bytes, share.bytes),
            ("FLOPs a row", printer.count, totals.before.flops, totals.after.flops, share.flops),
        )
    ]
    align: list[printer.Align] = ["left", "right", "right", "right"]
    return printer.table(("total", "before", "after", "share"), rows, width=WIDTH, align=align)


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


# ------------------------------------------------------------------------------------------ page

MOST_BARS = 60
"""Sites whose bars are drawn at once; those of further sites open on a click."""


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=printer.count,
        bytes=printer.bytes_,
        percent=printer.percent,
        seconds=printer.seconds,
        number=printer.number,
        shape=printer.shape_text,
        interval=_interval_text,
        breakable=_breakable,
        format_label=lambda name: printer.FORMAT_LABELS.get(name, name.replace("_", " ")),
    )
    return environment


def _breakable(name: str) -> markupsafe.Markup:
    """A qualified name that may be broken after its dots."""
    return markupsafe.Markup(".<wbr>").join(name.split("."))


def _page(report: Report) -> dict[str, Any]:
    """Everything that the template shows."""
    curve = report.curve
    return {
        "report": report,
        "plan": report.plan,
        "predicted": report.plan.predicted,
        "totals": report.totals,
        "share": report.totals.share,
        "bars": _bars(report.sites),
        "most_bars": MOST_BARS,
        "formats": [f for f in printer.FORMAT_LABELS if any(s.format == f for s in report.sites)],
        "other": report.totals.before.parameters - sum(s.parameters_before for s in report.sites),
        "chart": None if curve is None else _chart(curve, report),
        "plan_json": report.plan.to_json(),
        "total_seconds": sum(stage.seconds for stage in report.history),
    }


@dataclass(frozen=True)
class _Bar:
    """A site's two bars, in percent of the width; ``broken`` ones are longer than drawn."""

    site: SiteReport
    before: float
    after: float
    broken: bool


def _bars(sites: Sequence[SiteReport]) -> list[_Bar]:
    """Bars on one linear scale.

    An embedding is often ten times any other weight; drawn in full it would leave nothing to see of
    the others. What is longer than three times the upper quartile is cut and marked as broken.
    """
    sizes = sorted(site.parameters_before for site in sites)
    if not sizes:
        return []
    usual = [size for size in sizes if size <= 3 * sizes[3 * (len(sizes) - 1) // 4]]
    full = max(1.0, sizes[-1] if sizes[-1] == usual[-1] else min(sizes[-1], 1.5 * usual[-1]))
    return [
        _Bar(
            site,
            before=min(100.0, 100 * site.parameters_before / full),
            after=min(100.0, 100 * site.parameters_after / full),
            broken=site.parameters_before > full,
        )
        for site in sites
    ]


# The drawing area of the curve inside its picture, in the picture's own units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 92.0, 736.0, 44.0, 330.0


@dataclass(frozen=True)
class _Scale:
    """Where a budget and a quality lie in the picture; the quality's axis is logarithmic."""

    budget: float
    low: float
    high: float

    def x(self, budget: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * min(1.0, max(0.0, budget / self.budget)), 1)

    def y(self, quality: float) -> float:
        inside = math.log10(min(self.high, max(self.low, quality)) / self.low)
        return round(_BOTTOM - (_BOTTOM - _TOP) * inside / math.log10(self.high / self.low), 1)


def _chart(curve: Curve, report: Report) -> dict[str, Any] | None:
    """The geometry of the curve's picture; ``None`` where no point fits a logarithmic axis."""
    shown = sorted((p for p in curve if 0 < p.quality < math.inf), key=lambda p: p.budget)
    if not shown:
        return None
    predicted = report.plan.predicted
    losses = curve.quality_name.endswith("loss")
    chosen = predicted.loss if losses else predicted.output_error
    measured = report.measured_loss if losses else None
    marks = [v for v in (chosen, measured) if v is not None and 0 < v < math.inf]
    middle = [point.quality for point in shown] + marks
    ends = [end for point in shown for end in point.loss_interval or () if 0 < end < math.inf]
    # An interval may reach down to 0: a decade below the lowest point is where it leaves the axis.
    low, high = _log_ends(max(min(middle + ends), min(middle) / 10), max(middle + ends))
    share = report.totals.share.parameters
    widest = max([share, *(p.budget for p in shown)])
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if widest / s <= 6)
    scale = _Scale(step * math.ceil(widest / step - 1e-9), low, high)
    band = [(p.budget, *p.loss_interval) for p in shown if p.loss_interval is not None]
    edge = [(b, high) for b, _, high in band] + [(b, low) for b, low, _ in reversed(band)]
    x_chosen = scale.x(share)
    return {
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "x_ticks": [
            (scale.x(k * step), f"{100 * k * step:g} %")
            for k in range(round(scale.budget / step) + 1)
        ],
        "y_ticks": _log_ticks(scale),
        "line": " ".join(f"{scale.x(p.budget)},{scale.y(p.quality)}" for p in shown),
        "dots": [(scale.x(p.budget), scale.y(p.quality), p) for p in shown],
        "band": " ".join(f"{scale.x(b)},{scale.y(q)}" for b, q in edge),
        "x_chosen": x_chosen,
        "y_chosen": scale.y(chosen) if chosen is not None and chosen > 0 else None,
        "y_measured": scale.y(measured) if measured is not None and measured > 0 else None,
        "label_left": x_chosen > (_LEFT + _RIGHT) / 2,
        "chosen": chosen,
        "share": share,
        "quality_name": curve.quality_name,
        "left_out": len(curve) - len(shown),
    }


def _log_ends(low: float, high: float) -> tuple[float, float]:
    """The round values (1, 2 or 5 of a decade) around a range, at least a decade apart."""
    steps = [digit * 10.0**power for power in range(-300, 300) for digit in (1, 2, 5)]
    above = min(step for step in steps if step >= max(high, 10 * steps[0]) * (1 - 1e-9))
    low = min(max(low, steps[0]), above / 10)
    return max(step for step in steps if step <= low * (1 + 1e-9)), above


def _log_ticks(scale: _Scale) -> list[tuple[float, str, bool]]:
    """Position, text and whether it is a whole decade; between decades only where they are few."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    digits = (1, 2, 5) if scale.high / scale.low < 200 else (1,)
    ticks: list[tuple[float, str, bool]] = []
    for power in range(first, last + 1, max(1, (last - first) // 7)):
        for value in (digit * 10.0**power for digit in digits):
            if scale.low * 0.999 < value < scale.high * 1.001:
                text = f"{value:g}" if value > 0.9e-3 else f"{value:.0e}".replace("e-0", "e-")
                ticks.append((scale.y(value), text, value == 10.0**power))
    return ticks
