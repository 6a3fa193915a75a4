"""A timeline as an SVG picture: a row a stage, links and collectives in thin lanes below it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from tensorize.base import printer
from tensorize.distributed.strategy.simulate import (
    BACKWARD,
    COLLECTIVE,
    DATA,
    FORWARD,
    SEND,
    UPDATE,
    Span,
    Timeline,
)

_COLOURS = {
    FORWARD: "#4c78a8",
    BACKWARD: "#72b7b2",
    COLLECTIVE: "#e45756",
    SEND: "#f2a93b",
    DATA: "#b279a2",
    UPDATE: "#7f7f7f",
}
_LEFT, _TOP, _WIDTH = 90, 56, 1100
_ROW, _LANE, _GAP = 16, 5, 6
_THINNEST = 0.05
"""What is narrower in the picture's units is not drawn: nobody could see it."""


def svg(timeline: Timeline) -> str:
    """The picture's text."""
    step = _ROW + 2 * _LANE + _GAP
    height = _TOP + timeline.stages * step + 30
    strategy = timeline.estimate.strategy
    title = (
        f"{strategy}: a step of {printer.seconds(timeline.seconds)} ({timeline.schedule}); "
        f"each of the {timeline.stages} rows is {strategy.dp * strategy.tp} devices"
    )
    whole = _LEFT + _WIDTH + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{whole}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="13">{escape(title)}</text>',
        *_legend(timeline),
        *_axis(timeline, height),
    ]
    for stage in range(timeline.stages):
        y = _TOP + stage * step
        lines.append(f'<text x="8" y="{y + 12}">stage {stage}</text>')
        lines.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_ROW}" fill="#f0f0f0"/>')
    scale = _WIDTH / timeline.seconds
    for span in timeline.spans:
        if (span.end - span.start) * scale >= _THINNEST:
            lines.append(_rectangle(span, scale, _TOP + span.stage * step))
    return "\n".join([*lines, "</svg>", ""])


def _rectangle(span: Span, scale: float, top: float) -> str:
    lane = {SEND: _ROW, DATA: _ROW + _LANE}.get(span.kind)
    y, tall = (top, _ROW) if lane is None else (top + lane, _LANE - 1)
    x, wide = _LEFT + span.start * scale, (span.end - span.start) * scale
    which = "" if span.micro is None else f" of micro-batch {span.micro}"
    told = f"{span.kind}{which}: {printer.seconds(span.end - span.start)}"
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{tall}" '
        f'fill="{_COLOURS[span.kind]}"><title>{escape(printer.plain(told))}</title></rect>'
    )


def _legend(timeline: Timeline) -> Iterator[str]:
    kinds = {span.kind for span in timeline.spans}
    for k, kind in enumerate(kind for kind in _COLOURS if kind in kinds):
        x = _LEFT + 130 * k
        yield f'<rect x="{x}" y="28" width="12" height="12" fill="{_COLOURS[kind]}"/>'
        yield f'<text x="{x + 16}" y="38">{kind}</text>'


def _axis(timeline: Timeline, height: int) -> Iterator[str]:
    for k in range(6):
        x, at = _LEFT + _WIDTH * k / 5, printer.plain(printer.seconds(timeline.seconds * k / 5))
        yield f'<line x1="{x}" y1="{_TOP - 4}" x2="{x}" y2="{height - 26}" stroke="#ccc"/>'
        yield f'<text x="{x}" y="{height - 10}" text-anchor="middle">{escape(at)}</text>'
