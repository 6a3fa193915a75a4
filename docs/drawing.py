"""Strokes of the pictures, as SVG.

Their colours can be read on white and on black, so that one file serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SOFT, BLUE, GREEN, ORANGE = "#7b8494", "#4b83d6", "#2f9e83", "#d07a2c"

Point = tuple[float, float]


def text(x: float, y: float, words: str, color: str = SOFT, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def line(points: Sequence[Point], color: str = SOFT, width: float = 2, more: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}" {more}/>'
    )


def box(x: float, y: float, width: float, height: float, words: str, color: str = SOFT) -> str:
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{color}" '
        f'fill-opacity="0.13" stroke="{color}" stroke-width="1.5"/>'
    )
    return shape + text(x + width / 2, y + height / 2 + 5, words, color, "middle")


def dot(x: float, y: float, color: str, size: float = 5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="{color}"/>'


def axes(left: float, right: float, across: str, up: str) -> list[str]:
    """Both axes of a chart between two places, from y = 20 to y = 210."""
    return [
        line([(left, 20), (left, 210), (right, 210)], width=1.2),
        text((left + right) / 2, 234, across, anchor="middle"),
        f'<g transform="rotate(-90 {left - 12:g} 115)">',
        text(left - 12, 115, up, anchor="middle"),
        "</g>",
    ]


def sampled(function: Callable[[float], float], first: float, last: float) -> list[Point]:
    places = [first + (last - first) * k / 60 for k in range(61)]
    return [(x, function(x)) for x in places]


def svg(title: str, drawn: Sequence[str]) -> str:
    """A picture of 640 by 244."""
    body = "\n".join(drawn)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 244" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\" "
        f'font-size="14">\n<title>{title}</title>\n{body}\n</svg>\n'
    )
