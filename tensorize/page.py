"""A report as one HTML page: the bars of the sites, the curve's picture, the scales of both.

The page itself is ``templates/report.html.j2``; here is the geometry that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from tensorize import printer
from tensorize.report import Curve, Report, SiteReport

MOST_BARS = 60
"""Sites whose bars are drawn at once; those of further sites open on a click."""


def render(report: Report) -> str:
    """The page, which needs no network and no other file."""
    return environment().get_template("report.html.j2").render(_contents(report))


def environment() -> jinja2.Environment:
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
        interval=printer.interval,
        format_label=printer.format_text,
    )
    return environment


def _contents(report: Report) -> dict[str, Any]:
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
class Scale:
    """Where a budget and a quality lie in a picture; the quality's axis is logarithmic."""

    budget: float
    low: float
    high: float
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM

    def x(self, budget: float) -> float:
        inside = min(1.0, max(0.0, budget / self.budget))
        return round(self.left + (self.right - self.left) * inside, 1)

    def y(self, quality: float) -> float:
        inside = math.log10(min(self.high, max(self.low, quality)) / self.low)
        height = (self.bottom - self.top) / math.log10(self.high / self.low)
        return round(self.bottom - height * inside, 1)


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
    low, high = log_ends(max(min(middle + ends), min(middle) / 10), max(middle + ends))
    share = report.totals.share.parameters
    widest = max([share, *(p.budget for p in shown)])
    step, most = budget_steps(widest)
    scale = Scale(most, low, high)
    band = [(p.budget, *p.loss_interval) for p in shown if p.loss_interval is not None]
    edge = [(b, high) for b, _, high in band] + [(b, low) for b, low, _ in reversed(band)]
    x_chosen = scale.x(share)
    return {
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "x_ticks": budget_ticks(scale, step),
        "y_ticks": log_ticks(scale),
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


def budget_steps(widest: float) -> tuple[float, float]:
    """The distance of the ticks of an axis of budgets up to ``widest``, and where it ends."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if widest / s <= 6)
    return step, step * math.ceil(widest / step - 1e-9)


def budget_ticks(scale: Scale, step: float) -> list[tuple[float, str]]:
    """Position and text of the ticks of an axis of budgets."""
    count = round(scale.budget / step)
    return [(scale.x(k * step), f"{100 * k * step:g} %") for k in range(count + 1)]


def log_ends(low: float, high: float) -> tuple[float, float]:
    """The round values (1, 2 or 5 of a decade) around a range, at least a decade apart."""
    steps = [digit * 10.0**power for power in range(-300, 300) for digit in (1, 2, 5)]
    above = min(step for step in steps if step >= max(high, 10 * steps[0]) * (1 - 1e-9))
    low = min(max(low, steps[0]), above / 10)
    return max(step for step in steps if step <= low * (1 + 1e-9)), above


def log_ticks(scale: Scale) -> list[tuple[float, str, bool]]:
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
