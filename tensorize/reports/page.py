"""A report as one HTML page: its cards, its weights by layer, and their scale.

The page itself is ``templates/report.html.j2``; here is what it shows, and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorize.base import printer
from tensorize.base.html import environment
from tensorize.formats.registry import names
from tensorize.ir.plan import NATS, OF_VARIANCE
from tensorize.reports import layers
from tensorize.reports.data import ReportTotals, SiteReport, share_of
from tensorize.reports.layers import Kind
from tensorize.reports.picture import Kept, chart_of
from tensorize.reports.report import Report

OPEN_AT_MOST = 40
"""Sites whose table is open; of more it opens on a click."""


def render(report: Report) -> str:
    """The page, which needs no network and no other file."""
    pages = environment()
    pages.filters.update(cell_label=layers.label, hint=layers.hint)
    return pages.get_template("report.html.j2").render(_contents(report))


def _contents(report: Report) -> dict[str, Any]:
    """Everything that the template shows."""
    curve, folded = report.curve, layers.folded(report.sites)
    reasons = list(dict.fromkeys(site.reason for site in report.sites))
    return {
        "report": report,
        "plan": report.plan,
        "predicted": report.plan.predicted,
        "totals": report.totals,
        "share": report.totals.share,
        "flops": _flops(report.totals),
        "times": _times(report.totals, report.plan.batch_sizes),
        "unit": loss_unit(report),
        "layers": folded,
        "bars": _bars(folded.kinds),
        "open": len(report.sites) <= OPEN_AT_MOST,
        "formats": [f for f in names() if any(s.format == f for s in report.sites)],
        "reasons": [(r, sum(site.reason == r for site in report.sites)) for r in reasons],
        "number_of": {reason: k for k, reason in enumerate(reasons, 1)},
        "other": report.totals.before.parameters - sum(s.parameters_before for s in report.sites),
        "chart": None if curve is None else chart_of(curve, Kept.of(report)),
        "alone": False,
        "plan_json": report.plan.to_json(),
        "total_seconds": sum(stage.seconds for stage in report.history),
    }


def loss_unit(report: Report) -> str:
    """What the rise of the loss is counted in, in words."""
    unit = report.outlook.unit
    if unit == NATS:
        return f"nats {printer.each(report.outlook.row)}"
    return "a share of the outputs' variance" if unit == OF_VARIANCE else unit or ""


def _flops(totals: ReportTotals) -> dict[str, Any]:
    what, before, after = totals.counted_flops
    share = share_of(after, before)
    return {"what": printer.each(what), "before": before, "after": after, "share": share}


@dataclass(frozen=True)
class _Times:
    """What the matmuls are predicted to take, at some numbers of rows."""

    ratios: str
    lines: list[str]


def _times(totals: ReportTotals, counts: Sequence[int]) -> _Times | None:
    both = [
        (count, old, new)
        for count, old, new in zip(
            counts, totals.before.latency, totals.after.latency, strict=False
        )
        if old > 0 and new > 0
    ]
    if not both:
        return None
    ratios = sorted(old / new for _, old, new in both)
    ends = dict.fromkeys(printer.number(ratio, 2) for ratio in (ratios[0], ratios[-1]))
    lines = [f"{printer.plural(count, 'row')}: {_change(old, new)}" for count, old, new in both]
    return _Times(" to ".join(ends), lines)


def _change(old: float, new: float) -> str:
    """``"24.4 → 15.7 ms"``, of microseconds; both units where they differ."""
    before, after = (printer.seconds(1e-6 * time) for time in (old, new))
    unit = after.rpartition(" ")[2]
    return f"{before.removesuffix(f' {unit}')} → {after}"


@dataclass(frozen=True)
class _Bar:
    """A kind of weight, its parameters, and its two bars in percent of the width."""

    kind: Kind[SiteReport]
    parameters_before: int
    parameters_after: int
    before: float
    after: float

    @property
    def share(self) -> float:
        return share_of(self.parameters_after, self.parameters_before)

    @property
    def format(self) -> str:
        """That of most of its parameters, which gives the bar its colour."""
        sizes: dict[str, int] = {}
        for site in self.kind.weights:
            sizes[site.format] = sizes.get(site.format, 0) + site.parameters_before
        return max(sizes, key=sizes.__getitem__)


def _bars(kinds: Sequence[Kind[SiteReport]]) -> list[_Bar]:
    """Bars on one linear scale."""
    sizes = [
        (
            sum(site.parameters_before for site in kind.weights),
            sum(site.parameters_after for site in kind.weights),
        )
        for kind in kinds
    ]
    full = max([1, *(before for before, _ in sizes)])
    return [
        _Bar(kind, before, after, 100 * before / full, 100 * min(after, full) / full)
        for kind, (before, after) in zip(kinds, sizes, strict=True)
    ]
