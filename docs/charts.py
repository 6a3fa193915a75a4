"""Charts of tables of ``docs/benchmarks.md``, drawn from the tables themselves.

That the tables say what the benchmarks have kept, ``tests/benchmarks/test_quoted.py`` tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from docs.drawing import BLUE, GREEN, ORANGE, SOFT, Point, axes, dot, line, text
from docs.tables import table

PAGE = Path(__file__).parent / "benchmarks.md"
LEFT, RIGHT, TOP, BOTTOM = 60, 440, 30, 200
APART = 17
"""Between the names of two lines, at least."""


def rows(begins: str) -> tuple[list[str], dict[str, list[str]]]:
    """The table that begins so: its columns, and its rows by their name."""
    (_, *columns), *lines = table(PAGE, begins)
    return columns, {name: values for name, *values in lines}


def losses(head: str, across: str, shown: Mapping[str, str]) -> list[str]:
    """What methods lose over what is kept, both on logarithmic axes; a colour a method."""
    columns, found = rows(head)
    kept = [math.log(float(column.split("%")[0])) for column in columns]
    values = {
        name: [math.log10(float(cell.split()[0])) for cell in found[name] if cell != "–"]
        for name in shown
    }
    every = [value for name in shown for value in values[name]]
    low, high = math.floor(min(every)), math.ceil(max(every))

    def x(share: float) -> float:
        return LEFT + 20 + (RIGHT - LEFT - 30) * (share - min(kept)) / (max(kept) - min(kept))

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    drawn = axes(LEFT, RIGHT, across, "nats a token")
    for power in range(low, high + 1):
        drawn.append(line([(LEFT, y(power)), (RIGHT, y(power))], SOFT, 0.5))
        drawn.append(text(LEFT + 4, y(power) - 4, f"{10.0**power:.{max(0, -power)}f}"))
    ends = {}
    for name, color in shown.items():
        places = [share for share, cell in zip(kept, found[name], strict=True) if cell != "–"]
        points = sorted(zip(map(x, places), map(y, values[name]), strict=True))
        drawn.append(line(points, color, 3 if name == next(iter(shown)) else 1.5))
        drawn += [dot(*point, color, 3) for point in points]
        ends[name] = points[-1]
    for name, height in spread(ends).items():
        drawn.append(line([ends[name], (RIGHT + 12, height)], shown[name], 0.7))
        drawn.append(text(RIGHT + 16, height + 5, name, shown[name]))
    return drawn


def spread(ends: Mapping[str, Point]) -> dict[str, float]:
    """Heights for the names of lines that end there, none on another."""
    heights: dict[str, float] = {}
    last = -math.inf
    for name, (_, y) in sorted(ends.items(), key=lambda each: each[1][1]):
        last = heights[name] = max(y, last + APART)
    over = max(0.0, last - BOTTOM)
    return {name: height - over for name, height in heights.items()}


def speed() -> tuple[str, list[str]]:
    columns, found = rows("| | prefill")
    shown = {
        'tensorize, `torch.compile(backend="tensorize")`': ("tensorize, compiled", BLUE),
        "two `F.linear` by hand": ("two F.linear by hand", GREEN),
        "dense, `torch.compile`": ("dense, compiled", SOFT),
    }
    drawn = []
    for k, column in enumerate(columns):
        top = 14 + 58 * k
        drawn.append(text(190, top + 24, column, anchor="end"))
        for j, (row, (name, color)) in enumerate(shown.items()):
            width = 70 * float(found[row][k])
            drawn.append(bar(200, top + 15 * j, width, color))
            words = f"{found[row][k]} {name if k == 0 else ''}"
            drawn.append(text(206 + width, top + 15 * j + 11, words.strip(), color))
    return "Speedups over the dense model of a Llama with a quarter of every linear kept", drawn


def bar(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="12" fill="{color}"/>'


def quality() -> tuple[str, list[str]]:
    shown = {
        "ours, polish": BLUE,
        "ours, refit": BLUE,
        "ours, one-shot": BLUE,
        "K-FAC SVD": GREEN,
        "SVD-LLM": ORANGE,
        "ASVD": SOFT,
        "SVD": SOFT,
    }
    drawn = losses("| llama | 10% kept", "parameters kept of the Llama, 10 to 75 %", shown)
    return "What methods lose at equal parameters", drawn


def bits() -> tuple[str, list[str]]:
    shown = {
        "ours": BLUE,
        "ours, bits alone": GREEN,
        "ours, ranks alone": SOFT,
        "GPTQ": ORANGE,
        "RTN": ORANGE,
    }
    drawn = losses("| llama | 50% |", "bytes kept of the Llama, 8 to 50 %", shown)
    return "What bits, ranks and both lose at equal bytes", drawn
