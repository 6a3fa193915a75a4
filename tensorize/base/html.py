"""The templates of pages."""

from __future__ import annotations

from pathlib import Path

import jinja2

from tensorize.base import printer


def environment() -> jinja2.Environment:
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
