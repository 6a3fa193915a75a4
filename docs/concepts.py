"""The pictures of the concepts."""

from __future__ import annotations

import math
from collections.abc import Callable

from docs.drawing import BLUE, GREEN, ORANGE, SOFT, axes, box, dot, line, sampled, text

COLORS = (BLUE, GREEN, ORANGE)


def sites() -> tuple[str, list[str]]:
    drawn = [
        box(20, 90, 105, 44, "embedding"),
        box(165, 90, 80, 44, "q, k, v"),
        box(285, 90, 80, 44, "norm"),
        box(405, 90, 80, 44, "MLP"),
        box(525, 90, 95, 44, "head"),
        box(70, 10, 160, 34, "W of 1024×192", BLUE),
        box(275, 170, 165, 34, "no matmul: no site"),
        box(150, 170, 105, 34, "one site", GREEN),
        box(455, 170, 120, 34, "two sites", ORANGE),
        text(630, 26, "one site, two uses: lookup, and matmul", BLUE, "end"),
    ]
    for x in (125, 245, 365, 485):
        drawn.append(line([(x, 112), (x + 40, 112)]))
    drawn += [
        line([(72, 88), (110, 46)], BLUE, 1.5),
        line([(572, 88), (360, 46), (232, 30)], BLUE, 1.5, 'stroke-dasharray="5 4"'),
        line([(204, 136), (204, 168)], GREEN, 1.5),
        line([(325, 136), (345, 168)], SOFT, 1.5),
        line([(445, 136), (505, 168)], ORANGE, 1.5),
    ]
    return "A model, and its sites: a tied weight is one of them, with two uses", drawn


def metric() -> tuple[str, list[str]]:
    drawn = []
    for middle, name, flat in ((170, "without data: ‖ΔW‖", 1.0), (480, "with data: ‖ΔW C^½‖", 0.3)):
        around = [2 * math.pi * k / 60 for k in range(61)]
        turned = [(80 * math.cos(a), 80 * flat * math.sin(a)) for a in around]
        tilt = -0.5 if flat < 1 else 0.0
        points = [
            (
                middle + x * math.cos(tilt) - y * math.sin(tilt),
                110 + x * math.sin(tilt) + y * math.cos(tilt),
            )
            for x, y in turned
        ]
        drawn += [line(points, BLUE), text(middle, 222, name, anchor="middle")]
        for k in range(40):  # inputs, along one direction for the most part
            along, across = 75 * math.sin(3.1 * k), 17 * math.sin(7.7 * k + 1)
            x = middle + along * math.cos(-0.5) - across * math.sin(-0.5)
            drawn.append(dot(x, 110 + along * math.sin(-0.5) + across * math.cos(-0.5), SOFT, 2))
    drawn += [
        text(170, 22, "every direction counts alike", BLUE, "middle"),
        text(480, 22, "what inputs never meet may be lost", BLUE, "middle"),
    ]
    return "The metric: inputs (dots) lie in few directions, and only these cost outputs", drawn


DECAYS = ((165, 95.0), (120, 190.0), (185, 330.0))
"""How high the curve of a weight begins, and how slowly it falls."""


def lost(k: int) -> Callable[[float], float]:
    """Where the curve of a weight lies in a picture: what is lost, over parameters."""
    height, slow = DECAYS[k]
    return lambda x: 210 - height * math.exp(-(x - 60) / slow)


def curves() -> tuple[str, list[str]]:
    drawn = axes(60, 600, "parameters of a weight", "what is lost")
    for k, color in enumerate(COLORS):
        drawn.append(line(sampled(lost(k), 60, 600), color))
    drawn += [
        text(400, 60, "a weight that needs its ranks", ORANGE),
        text(215, 152, "one that needs some", GREEN),
        text(70, 203, "one that needs few", BLUE),
    ]
    return "Curves: what each weight loses at every rank", drawn


def allocation() -> tuple[str, list[str]]:
    drawn, slope = axes(60, 600, "parameters of a weight", "what is lost"), 0.2
    for k, color in enumerate(COLORS):
        height, slow = DECAYS[k]
        x = 60 + slow * math.log(height / (slow * slope))  # where the curve has the slope
        y = lost(k)(x)
        drawn += [
            line(sampled(lost(k), 60, 600), color, 1.5, 'stroke-opacity="0.55"'),
            line([(x - 70, y - 70 * slope), (x + 70, y + 70 * slope)], SOFT, 1.5),
            dot(x, y, color, 6),
            line([(x, y), (x, 210)], color, 1, 'stroke-dasharray="3 4"'),
        ]
    drawn.append(
        text(600, 40, "one slope for all: the next number buys as much anywhere", SOFT, "end")
    )
    return "Allocation: every weight stands where its curve has one common slope", drawn


def orders() -> tuple[str, list[str]]:
    drawn = axes(60, 600, "rows", "FLOPs")
    ways = (
        ("core after core", BLUE, 0.0, 0.62),
        ("two cores joined first", GREEN, 34.0, 0.34),
        ("the dense weight made first", ORANGE, 92.0, 0.17),
    )
    for _, color, start, slope in ways:
        end = min(600.0, 60 + (185 - start) / slope)
        points = [(60.0, 210 - start), (end, 210 - start - slope * (end - 60))]
        drawn.append(line(points, color, 1.5, 'stroke-opacity="0.6"'))
    drawn += [
        text(352, 36, ways[0][0], BLUE, "end"),
        text(315, 124, ways[1][0], GREEN),
        text(66, 76, ways[2][0], ORANGE),
    ]

    def best(x: float) -> float:
        return 210 - min(start + slope * (x - 60) for _, _, start, slope in ways)

    drawn += [
        line(sampled(best, 60, 600), SOFT, 5, 'stroke-opacity="0.5" stroke-linejoin="round"'),
        text(300, 196, "thick: the best one for every number of rows"),
    ]
    return "Orders: each costs a line over the rows; the lowest is run", drawn
