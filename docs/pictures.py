"""The pictures of the pages: ``python -m docs.pictures`` writes them into ``docs/pictures``."""

from __future__ import annotations

from pathlib import Path

from docs import charts, concepts
from docs.drawing import svg

HERE = Path(__file__).parent / "pictures"
PAGES = {
    "concepts": (
        concepts.sites,
        concepts.metric,
        concepts.curves,
        concepts.allocation,
        concepts.orders,
    ),
    "benchmarks": (charts.speed, charts.quality, charts.bits),
}
"""What each page shows. A picture is a title and its strokes."""


def pictures() -> dict[str, str]:
    """The text of every picture, by its name."""
    return {draw.__name__: svg(*draw()) for drawn in PAGES.values() for draw in drawn}


if __name__ == "__main__":
    for name, text in pictures().items():
        (HERE / f"{name}.svg").write_text(text, encoding="utf-8")
