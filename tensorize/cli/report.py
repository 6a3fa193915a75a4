"""``tensorize report``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tensorize.cli.options import Json
from tensorize.cli.telling import check_target, errors_told, print_json
from tensorize.serve.service import check, services_of, told
from tensorize.store.manifest import read_report


def report_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page.", show_default=False)
    ] = None,
    serve: Annotated[
        Literal["vllm"] | None,
        typer.Option(help="Say how an engine serves each weight instead.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to a saved model; reads the manifest only."""
    with errors_told():
        check_target(html, "--html")
        if serve is not None:
            _say_how_it_is_served(directory, as_json)
            return
        report = read_report(directory)
        if html is not None:
            report.to_html(html)
        if as_json:
            print_json(report.to_dict())
            return
        typer.echo(str(report))
        if html is not None:
            typer.echo(f"\nreport as a page: {html}")


def _say_how_it_is_served(directory: Path, as_json: bool) -> None:
    found = services_of(directory)
    if as_json:
        print_json({"weights": [asdict(each) for each in found]})
    else:
        typer.echo("\n".join(told(found)))
    check(found)
