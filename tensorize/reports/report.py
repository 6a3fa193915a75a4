"""What was done to a model: site by site, in total, and how it came about.

``str(report)`` is a table for a terminal, ``report.to_html(path)`` one self-contained page,
``report.to_dict()`` JSON that ``Report.from_dict`` reads back exactly. All of it is frozen data;
the pipeline fills it, nothing here computes a figure that is not a sum or a share.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensorize.base import files, html, printer
from tensorize.base.errors import TensorizeError
from tensorize.base.html import Picture
from tensorize.base.records import by_field, decode, encode, record
from tensorize.ir.plan import Plan
from tensorize.reports import picture
from tensorize.reports.curve import Curve
from tensorize.reports.data import ReportTotals, RunsBy, SiteReport, Stage
from tensorize.reports.text import (
    hanging,
    listing,
    measured_text,
    named_text,
    site_table,
    totals_table,
)
from tensorize.reports.verdict import NOTHING_KNOWN, Outlook, Verdict


@dataclass(frozen=True, repr=False)
class Report:
    """The plan, what came of it, and the record of how.

    ``notes`` are warnings, things that were skipped, and limits. ``backend`` is what the caller
    asked weights to run by, ``fused`` what launches of compiled graphs took in, and around which
    weights. ``environment`` is pairs of names and values: versions, machine, seed.
    ``measured_loss`` and ``measured_error`` are the rise of the loss and the error of the outputs
    where they were measured. ``weights`` are samples of the parameters that all of it is of.
    ``outlook`` is what the verdict says beside the plan.

    Examples:
        >>> report = tensorize.report(small)
        >>> [site.format for site in report.factorized][:1]
        ['low_rank']
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
    weights: tuple[str, ...] = ()
    outlook: Outlook = NOTHING_KNOWN

    @property
    def verdict(self) -> Verdict:
        """What is kept, gained and lost, in words and figures; where too much is, what to do."""
        return Verdict(self.plan, self.totals, self.outlook, self.measured_loss)

    @property
    def factorized(self) -> tuple[SiteReport, ...]:
        """The sites that did not stay dense."""
        return tuple(site for site in self.sites if not site.left)

    @property
    def running(self) -> list[str]:
        """What weights run by, a line for those of one answer."""
        alike: dict[tuple[RunsBy, ...], list[str]] = {}
        for site in self.sites:
            if site.runs_by:
                alike.setdefault(site.runs_by, []).append(site.name)
        return [named_text("; ".join(map(str, runs_by)), names) for runs_by, names in alike.items()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data: plain dicts, lists, strings and finite numbers."""
        return encode(by_field(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` described, equal to it in every field."""
        return record(cls, decode(data))

    def __repr__(self) -> str:
        blocks = [
            str(self.verdict),
            totals_table(self.totals, self.plan.batch_sizes),
            f"{len(self.factorized)} of {printer.plural(len(self.sites), 'weight')} factorized, "
            f"{printer.plural(len(self.notes), 'note')}: print(report) has them all",
        ]
        return printer.plain("\n\n".join(blocks))

    def __str__(self) -> str:
        kept = len(self.sites) - len(self.factorized)
        head = (
            f"tensorize: {len(self.sites)} sites, {len(self.factorized)} factorized, {kept} dense; "
            f"budget {self.plan.budget}. Errors are relative, of a site's weight, in the metric "
            f"{self.plan.metric}: predicted, then measured."
        )
        reasons = list(dict.fromkeys(site.reason for site in self.sites))
        blocks = [
            str(self.verdict),
            "\n".join(textwrap.wrap(head, printer.prose_width())),
            site_table(self.sites, reasons) if self.sites else "no site was found",
            totals_table(self.totals, self.plan.batch_sizes),
            "\n".join(hanging(name, text) for name, text in self._quality()),
            *listing("runs by", self.running),
            *listing("fused in compiled graphs", [named_text(*each) for each in self.fused]),
            *listing("why", [f"[{k}] {reason}" for k, reason in enumerate(reasons, 1)]),
            *listing("notes", [f"* {note}" for note in self.notes]),
        ]
        return printer.plain("\n\n".join(blocks))

    def _quality(self) -> Iterator[tuple[str, str]]:
        """What is known of the quality: predictions, what was measured, and on what."""
        if self.outlook.sufficiency is not None:
            yield "calibration data", str(self.outlook.sufficiency)
        predicted, metric = self.plan.predicted, f", metric {self.plan.metric}"
        error = printer.number(predicted.output_error)
        if predicted.loss is not None:
            interval = predicted.loss_interval
            span = f", 90 %: {printer.interval(interval)}" if interval is not None else ""
            loss = f"{printer.number(predicted.loss)}{span}{metric}"
            yield "predicted rise of the loss", loss + measured_text(self.measured_loss)
            yield "predicted error of the outputs", error + measured_text(self.measured_error)
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
        from tensorize.reports import page  # which draws what is defined here

        files.write_text(path, page.render(self))

    def plot(self) -> Picture:
        """The curve by budget, with this model on it: a picture that notebooks show.

        Raises:
            TensorizeError: the report has no curve, as of a model that was not compiled.
        """
        if self.curve is None:
            raise TensorizeError(
                "the report has no curve, which an analysis gives",
                way_out="tensorize.analyze(model).curve().picture()",
            )
        return picture.draw(self.curve, picture.Kept.of(self))

    def _repr_html_(self) -> str:
        from tensorize.reports import page

        return html.framed(page.render(self))
