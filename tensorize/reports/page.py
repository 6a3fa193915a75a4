"""A report as one HTML page: the bars of the sites, the curve's picture, the scales of both.

The page itself is ``templates/report.html.j2``; here is the geometry that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorize.base.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Scale,
    budget_steps,
    budget_ticks,
    log_ends,
    log_ticks,
)
from tensorize.base.html import environment
from tensorize.formats.registry import names
from tensorize.reports.curve import Curve
from tensorize.reports.data import SiteReport
from tensorize.reports.report import Report

MOST_BARS = 60
"""Sites whose bars are drawn at once; those of further sites open on a click."""


def render(report: Report) -> str:
    """The page, which needs no network and no other file."""
    return environment().get_template("report.html.j2").render(_contents(report))


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
        "formats": [f for f in names() if any(s.format == f for s in report.sites)],
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
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "bottom": BOTTOM,
        "x_ticks": budget_ticks(scale, step),
        "y_ticks": log_ticks(scale),
        "line": " ".join(f"{scale.x(p.budget)},{scale.y(p.quality)}" for p in shown),
        "dots": [(scale.x(p.budget), scale.y(p.quality), p) for p in shown],
        "band": " ".join(f"{scale.x(b)},{scale.y(q)}" for b, q in edge),
        "x_chosen": x_chosen,
        "y_chosen": scale.y(chosen) if chosen is not None and chosen > 0 else None,
        "y_measured": scale.y(measured) if measured is not None and measured > 0 else None,
        "label_left": x_chosen > (LEFT + RIGHT) / 2,
        "chosen": chosen,
        "share": share,
        "quality_name": curve.quality_name,
        "left_out": len(curve) - len(shown),
    }
