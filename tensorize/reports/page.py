"""A report as one HTML page: the bars of the sites, and their scale.

The page itself is ``templates/report.html.j2``; here is the geometry that it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorize.base.html import environment
from tensorize.formats.registry import names
from tensorize.reports.data import SiteReport
from tensorize.reports.picture import Kept, chart_of
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
        "chart": None if curve is None else chart_of(curve, Kept.of(report)),
        "alone": False,
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
