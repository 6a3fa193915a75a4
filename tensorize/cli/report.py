"""``tensorize report`` and ``info``: what was done to a model, and what one is."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tensorize.base import printer
from tensorize.base.progress import no_progress
from tensorize.cli import options as option
from tensorize.cli.options import Json
from tensorize.cli.telling import check_target, errors_told, print_json, say

if TYPE_CHECKING:
    from torch import nn

    from tensorize.serve.service import Engine


def report_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page.", show_default=False)
    ] = None,
    serve: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(help="Say how an engine serves each weight instead.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to a saved model; reads the manifest only."""
    from tensorize.store.manifest import read_report

    with errors_told():
        check_target(html, "--html")
        if serve is not None:
            _say_how_it_is_served(directory, serve, as_json)
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


def info_command(
    source: option.Source,
    dtype: option.DtypeOption = option.Dtype.auto,
    as_json: option.Json = False,
) -> None:
    """Say what a model is: a dense one by its weights, a saved one by its verdict."""
    from tensorize.cli.sources import load_source
    from tensorize.store.manifest import MANIFEST, read_report

    with errors_told():
        if (Path(source) / MANIFEST).is_file():
            report = read_report(source)
            if as_json:
                lines = report.verdict.lines
                print_json({"compressed": True, "ruined": report.verdict.ruined, "verdict": lines})
            else:
                typer.echo(repr(report))
            return
        with contextlib.redirect_stdout(sys.stderr):
            say(f"loading {source}")
            loaded = load_source(source, dtype)
            known = _about(loaded.model, loaded.example_inputs)
        if as_json:
            print_json({"compressed": False, **known})
        else:
            typer.echo(_told(known))


def _about(model: nn.Module, inputs: Any) -> dict[str, Any]:
    from tensorize.api.analyze import found_in
    from tensorize.api.options import Options
    from tensorize.weight.whole_model import numbers

    found = found_in(model, Options(example_inputs=inputs), no_progress)
    held = {id(p): p for p in model.parameters()}.values()
    kept = Counter(site.blocked for site in found.sites if site.blocked is not None)
    return {
        "class": type(model).__name__,
        "parameters": numbers(model),
        "bytes": sum(p.nbytes for p in held),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in held}),
        "weights": len(found.sites),
        "can_be_compressed": len(found.free),
        "parameters_that_can": sum(site.parameters for site in found.free),
        "stay_dense": dict(kept),
        "notes": list(found.notes),
    }


def _told(known: dict[str, Any]) -> str:
    share = known["parameters_that_can"] / max(known["parameters"], 1)
    lines = [
        f"{known['class']}: {printer.count(known['parameters'])} parameters, "
        f"{printer.bytes_(known['bytes'])} in {', '.join(known['dtypes'])}",
        f"{known['can_be_compressed']} of {printer.plural(known['weights'], 'weight')} can be "
        f"compressed: {printer.percent(share)} of the parameters",
        *(f"  {count} stay dense: {why}" for why, count in known["stay_dense"].items()),
        *(f"note: {note}" for note in known["notes"]),
    ]
    return printer.plain("\n".join(lines))


def _say_how_it_is_served(directory: Path, engine: Engine, as_json: bool) -> None:
    from tensorize.serve.service import check, services_of, told

    found = services_of(directory, engine)
    if as_json:
        print_json({"weights": [asdict(each) for each in found]})
    else:
        typer.echo("\n".join(told(found)))
    check(found)
