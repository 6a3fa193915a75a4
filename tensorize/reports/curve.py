"""Predicted quality, size and times by budget."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from tensorize.base import files, html, printer
from tensorize.base.errors import TensorizeError
from tensorize.base.html import Picture
from tensorize.base.records import decode, encode, record
from tensorize.formats.low_rank import LowRank
from tensorize.reports import picture
from tensorize.reports.data import CurvePoint


def check_plotting() -> None:
    """Found out before long work: whether a curve can be drawn.

    Raises:
        TensorizeError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TensorizeError(
            "plotting a curve needs matplotlib, which is not installed",
            way_out="pip install matplotlib; without a plot, the curve is printed as a table",
        ) from error


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

    @property
    def has_bits(self) -> bool:
        """Whether plans of ranks alone stand beside its points: budgets are then bytes."""
        return any(point.ranks_alone is not None for point in self.points)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles, and a row for every point."""
        has_bits = self.has_bits
        names = [metric.name for metric in self.points[0].metrics] if self.points else []
        rows = [
            (
                printer.percent(point.budget),
                printer.count(point.parameters),
                printer.bytes_(point.bytes),
                printer.count(point.flops),
                printer.number(point.output_error),
                printer.number(point.loss),
                printer.interval(point.loss_interval),
                *([printer.number(point.ranks_alone)] if has_bits else []),
                *(
                    f"{printer.number(m.value)} ({printer.interval(m.interval)})"
                    for m in point.metrics
                ),
                ", ".join(printer.seconds(1e-6 * each) for each in point.latency),
            )
            for point in self.points
        ]
        headers = (
            *("budget", "parameters", "bytes", "FLOPs a row", "error", "loss", "90 % interval"),
            *(["ranks alone"] if has_bits else []),
            *names,
            "times",
        )
        return headers, rows

    def __str__(self) -> str:
        headers, rows = self._table()
        align: list[printer.Align] = ["right"] * len(headers)
        align[-1] = "list"
        body = printer.table(headers, rows, align=align)
        return f"predicted by budget, metric {self.metric}\n\n{body}"

    def picture(self) -> Picture:
        """It as a picture that notebooks show, without matplotlib.

        Raises:
            TensorizeError: no point has a positive, finite quality.
        """
        return picture.draw(self)

    def _repr_html_(self) -> str:
        above = f"predicted by budget, metric {self.metric}"
        shown = any(0 < point.quality < math.inf for point in self.points)
        drawn = self.picture()._repr_html_() if shown else ""
        return html.table(*self._table(), above) + drawn

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the curve with matplotlib, in the format that the suffix of ``path`` names.

        Raises:
            TensorizeError: matplotlib is not installed, or the directory does not exist.
        """
        target = files.writable(path)
        check_plotting()
        from matplotlib.figure import Figure

        shown = [point for point in self.points if point.quality > 0]
        budgets = [100 * point.budget for point in shown]
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        color = LowRank.colors[0]
        band = [(100 * p.budget, *p.loss_interval) for p in shown if p.loss_interval is not None]
        if band:
            floor = 0.1 * min(point.quality for point in shown)
            x, low, high = zip(*band, strict=True)
            low = [max(value, floor) for value in low]
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0, label="90 % interval")
        axes.plot(budgets, [point.quality for point in shown], color=color, marker="o")
        beside = [(100 * p.budget, p.ranks_alone) for p in shown if p.ranks_alone]
        if beside:
            axes.plot(*zip(*beside, strict=True), color=color, ls="--", label="ranks alone")
        if shown:
            axes.set_yscale("log")
        axes.set_xlabel(f"{'bytes' if beside else 'parameters'} kept (%)")
        axes.set_ylabel(self.quality_name)
        axes.set_title(f"metric: {self.metric}")
        axes.grid(alpha=0.25)
        if band or beside:
            axes.legend(frameon=False)
        figure.savefig(target)

    def to_dict(self) -> dict[str, Any]:
        return encode({"metric": self.metric, "points": self.points})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        return record(cls, decode(data))
