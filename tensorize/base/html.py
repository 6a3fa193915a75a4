"""HTML: the templates of pages, and what notebooks show without touching what stands around it."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tensorize.base import files, printer

if TYPE_CHECKING:
    import jinja2


def environment() -> jinja2.Environment:
    """The templates of pages."""
    import jinja2  # only where something is drawn

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=printer.count,
        bytes=printer.bytes_,
        percent=printer.percent,
        seconds=printer.seconds,
        number=printer.number,
        shape=printer.shape_text,
        interval=printer.interval,
        format_label=printer.format_text,
    )
    return environment


@dataclass(frozen=True, repr=False)
class Picture:
    """A picture as SVG: notebooks show it, ``save`` writes it, ``str()`` is its text."""

    svg: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as one self-contained file.

        Raises:
            TensorizeError: the directory of ``path`` does not exist or cannot be written.
        """
        files.write_text(path, self.svg)

    def __str__(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"Picture({len(self.svg):,} characters of SVG: .save(path) writes them)"

    def _repr_html_(self) -> str:
        # As an image: a style inside of a page would be one of all of it.
        data = base64.b64encode(self.svg.encode()).decode()
        return f'<img alt="" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">'


def framed(page: str, height: int = 640) -> str:
    """A whole page inside of another."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: {height}px; '
        'border: 0"></iframe>'
    )


def text(lines: str) -> str:
    """Text of lines of one width."""
    return f'<pre style="overflow-x: auto; line-height: 1.35">{html.escape(lines)}</pre>'


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], above: str = "") -> str:
    """A table, with some lines of text above it."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in headers)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    lines = f"<p>{html.escape(above)}</p>" if above else ""
    return f"{lines}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
