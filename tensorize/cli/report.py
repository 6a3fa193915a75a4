"""``tensorize report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorize.cli.options import Json
from tensorize.cli.telling import check_target, errors_told, print_json
from tensorize.store.manifest import read_report


def report_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to a saved model; reads the manifest only."""
    with errors_told():
        check_target(html, "--html")
        report = read_report(directory)
        if html is not None:
            report.to_html(html)
        if as_json:
            print_json(report.to_dict())
            return
        typer.echo(str(report))
        if html is not None:
            typer.echo(f"\nreport as a page: {html}")
