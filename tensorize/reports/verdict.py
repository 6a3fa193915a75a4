"""The verdict: what a compile kept, gained and lost, in words and figures, and what else there is.

A model is ruined where what it loses is above ``RUINED``. What it loses is what was measured, where
it was healed, else what is predicted.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tensorize.base import printer
from tensorize.ir.plan import NATS, OF_VARIANCE, RUINED, Plan
from tensorize.ir.sufficiency import Sufficiency
from tensorize.reports.data import ReportTotals, share_of

WANTED_LOSSES = (0.1, 0.01)
"""What nearest budgets are told for, where a model is ruined."""


HEALED = "at a tenth of a small GPT it gave back two thirds of the loss in 300 steps"
"""What was measured: ``python -m benchmarks.heal --models gpt``."""


@dataclass(frozen=True)
class Nearest:
    """The least that is predicted to lose no more than ``loss``.

    ``share`` is one of the parameters, or of the bytes where bits were chosen with the ranks.
    """

    loss: float
    share: float


@dataclass(frozen=True)
class Bits:
    """The bytes of a model, as a share, whose weights all become integers of ``precision``.

    ``loss``: what it loses where every entry goes to the nearest code; None: not tried.
    """

    precision: str
    share: float
    loss: float | None = None


@dataclass(frozen=True)
class Outlook:
    """What the loss is counted in, and, where a model is ruined, what else there is.

    ``unit`` is None where no loss is predicted. ``text_loss`` is the dense model's cross-entropy of
    the text that predictions were measured on, in nats a token. ``bits`` is what the plan
    was not to choose: where it was tried, the fewest bits that lose no more than the larger of
    ``WANTED_LOSSES`` (else the most there are), where not, the most that fit into the bytes of the
    plan, or the fewest there are. ``row``: what a row of the outputs is, a token or an image.
    ``sufficiency``: how far the calibration data suffice.
    """

    unit: str | None = None
    text_loss: float | None = None
    nearest: tuple[Nearest, ...] = ()
    bits: Bits | None = None
    in_bytes: bool = False
    row: str = "row"
    sufficiency: Sufficiency | None = None


NOTHING_KNOWN = Outlook()


@dataclass(frozen=True)
class Verdict:
    """What became of a model: ``ruined`` says whether it is of use, ``str()`` all there is to say.

    Examples:
        >>> tensorize.report(small).verdict.ruined
        False
    """

    plan: Plan
    totals: ReportTotals
    outlook: Outlook
    measured: float | None = None

    @property
    def lost(self) -> float | None:
        """The rise of the loss: as measured, else as predicted; None where nobody knows."""
        return self.plan.predicted.loss if self.measured is None else self.measured

    @property
    def ruined(self) -> bool | None:
        """Whether it lost more than ``RUINED``; None where that cannot be told."""
        limit = RUINED.get(self.outlook.unit or "")
        return None if limit is None or self.lost is None else not self.lost <= limit

    @property
    def lines(self) -> tuple[str, str, str]:
        """It in three lines: what is kept and how fast it is, what is lost, what to do."""
        return self._kept, self._lost, self._next

    @property
    def _kept(self) -> str:
        before, after = self.totals.before, self.totals.after
        shares = f"{printer.percent(share_of(after.parameters, before.parameters))} of the "
        shares += f"parameters, {printer.percent(share_of(after.bytes, before.bytes))} of the bytes"
        sizes = f"({printer.bytes_(after.bytes)} of {printer.bytes_(before.bytes)})"
        times = [
            (rows, old / new)
            for rows, old, new in zip(
                self.plan.batch_sizes, before.latency, after.latency, strict=False
            )
            if old > 0 and new > 0
        ]
        if not times:
            return f"kept: {shares} {sizes}"
        counts, ratios = zip(*times, strict=True)
        fast = f"{_several(map(printer.number, ratios))} times as fast at {_several(counts)} rows"
        return f"kept: {shares} {sizes}; its matmuls {fast} (predicted)"

    @property
    def _lost(self) -> str:
        lost, unit = self.lost, self.outlook.unit
        if lost is None:
            return (
                f"lost: not known, as the weights were judged without data: the worst of them is "
                f"off by {printer.percent(self.plan.predicted.output_error)} of its size"
            )
        said = "RUINED" if self.ruined else "lost"
        text = f"{said}: {'measured' if self.measured is not None else 'predicted'} to lose "
        text += _words(lost, unit, self.outlook.row)
        interval = self.plan.predicted.loss_interval
        if self.measured is None and interval is not None:
            text += f" (90 %: {_span(interval, unit)})"
        if self.outlook.text_loss is not None and unit == NATS:
            known = self.outlook.text_loss
            old, new = (math.exp(min(loss, 700.0)) for loss in (known, known + lost))
            text += f": perplexity from {printer.number(old)} to some {printer.number(new)}"
        return text

    @property
    def _next(self) -> str:
        if self.lost is None:
            return (
                'next: calibration= (data, or "self") weighs errors by what they do to the outputs '
                "and predicts the loss; tensorize.evaluate measures it"
            )
        if not self.ruined:
            return "next: tensorize.report(model) has every weight, tensorize.evaluate measures"
        return f"instead: {'; '.join(self._instead)}"

    @property
    def _instead(self) -> Iterator[str]:
        of = "bytes" if self.outlook.in_bytes else "parameters"
        for k, near in enumerate(self.outlook.nearest):
            first = f" of the {of} is predicted to lose" if k == 0 else ""
            yield f"budget={near.share:g}{first} {near.loss:g}"
        bits = self.outlook.bits
        if bits is not None:
            share = printer.percent(bits.share)
            lost = "" if bits.loss is None else f" and loses {printer.number(bits.loss)}"
            alone = f"{bits.precision} alone keeps {share} of the bytes{lost}"
            yield f'precision="auto" adds bits ({alone})'
        yield f"tensorize.heal(model, teacher, batches) trains the factors on ({HEALED})"

    def __str__(self) -> str:
        width = printer.prose_width()
        return printer.plain(
            "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in self.lines)
        )


def _several(items: Iterable[object]) -> str:
    """``1, 16 and 256``."""
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last


def _span(ends: tuple[float, float], unit: str | None) -> str:
    """An interval, in what ``_words`` counts in."""
    if unit == OF_VARIANCE:
        return " to ".join(printer.percent(end) for end in ends)
    return printer.interval(ends)


def _words(lost: float, unit: str | None, row: str) -> str:
    """A rise of the loss in the words of what it is counted in."""
    if unit == NATS:
        return f"{printer.number(lost)} nats {printer.each(row)}"
    if unit == OF_VARIANCE:
        return f"{printer.percent(lost)} of the outputs' variance"
    return f"{printer.number(lost)} in the loss"
