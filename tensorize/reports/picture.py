"""A curve as a picture (SVG): its geometry, which ``templates/curve.svg.j2`` shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from tensorize.base.errors import TensorizeError
from tensorize.base.html import Picture, environment

if TYPE_CHECKING:  # what is drawn, whose file needs this one
    from tensorize.reports.curve import Curve
    from tensorize.reports.report import Report


@dataclass(frozen=True)
class Kept:
    """Where a model lies among the points of a curve."""

    share: float
    loss: float | None
    error: float
    measured: float | None

    @classmethod
    def of(cls, report: Report) -> Kept:
        predicted = report.plan.predicted
        share, measured = report.totals.share, report.measured_loss
        bits = report.curve is not None and report.curve.has_bits
        kept = share.bytes if bits else share.parameters
        return cls(kept, predicted.loss, predicted.output_error, measured)


def draw(curve: Curve, kept: Kept | None = None) -> Picture:
    """The curve, and where a model lies on it.

    Raises:
        TensorizeError: no point has a quality that a logarithmic axis can show.
    """
    chart = chart_of(curve, kept)
    if chart is None:
        raise TensorizeError(
            "no point of the curve has a positive, finite quality to draw",
            way_out="print(curve) is a table of all points",
        )
    template = environment().get_template("curve.svg.j2")
    return Picture(template.render(chart=chart, alone=True))


def chart_of(curve: Curve, kept: Kept | None = None) -> dict[str, Any] | None:
    """The geometry of the curve's picture; ``None`` where no point fits a logarithmic axis."""
    shown = sorted((p for p in curve if 0 < p.quality < math.inf), key=lambda p: p.budget)
    if not shown:
        return None
    losses = curve.quality_name.endswith("loss")
    chosen, measured, share = None, None, None
    if kept is not None:
        chosen = kept.loss if losses else kept.error
        measured, share = kept.measured if losses else None, kept.share
    marks = [v for v in (chosen, measured) if v is not None and 0 < v < math.inf]
    middle = [point.quality for point in shown] + marks
    ends = [end for point in shown for end in point.loss_interval or () if 0 < end < math.inf]
    # An interval may reach down to 0: a decade below the lowest point is where it leaves the axis.
    low, high = log_ends(max(min(middle + ends), min(middle) / 10), max(middle + ends))
    widest = max([share or 0.0, *(p.budget for p in shown)])
    step, most = budget_steps(widest)
    scale = Scale(most, low, high)
    band = [(p.budget, *p.loss_interval) for p in shown if p.loss_interval is not None]
    edge = [(b, high) for b, _, high in band] + [(b, low) for b, low, _ in reversed(band)]
    x_chosen = scale.x(share or 0.0)
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
        "of": "bytes" if curve.has_bits else "parameters",
        "quality_name": curve.quality_name,
        "left_out": len(curve) - len(shown),
    }
