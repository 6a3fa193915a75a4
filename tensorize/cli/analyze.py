"""``tensorize analyze``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tensorize.base import printer
from tensorize.cli import options as option
from tensorize.cli.telling import check_target, errors_told, print_json, say


def analyze_command(
    source: option.Source,
    calibration: option.Calibration = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the parameters, as 0.1,0.25,0.5. Default: a ladder of all that are "
            "feasible.",
            show_default=False,
        ),
    ] = None,
    metric: option.Metric = None,
    include: option.Include = None,
    exclude: option.Exclude = None,
    formats: option.Formats = None,
    precision: option.Precision = None,
    activations: option.Activations = None,
    seed: option.Seed = 0,
    cache_dir: option.Cache = None,
    max_memory: option.MaxMemory = None,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = option.Dtype.auto,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the curve: .png, .svg or .pdf.", show_default=False),
    ] = None,
    as_json: option.Json = False,
) -> None:
    """Predict quality, size and cost for several budgets, without compressing anything."""
    given = locals()
    from tensorize.api.analyze import analyzed
    from tensorize.cli.parse import parse_shares, read_options
    from tensorize.cli.sources import load_told
    from tensorize.weight.whole_model import numbers

    with errors_told():
        options = read_options(given)
        shares = None if budgets is None else parse_shares(budgets)
        _check_plot(plot)
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = load_told(source, dtype, calibration, batch_size, max_length)
            say(f"analysing {numbers(loaded.model):,} parameters")
            data = {"example_inputs": loaded.example_inputs, "calibration": batches}
            analysis = analyzed(loaded.model, replace(options, **data))
            curve = analysis.curve(shares)
            if plot is not None:
                curve.plot(plot)
        if as_json:
            print_json({"curve": curve.to_dict(), "notes": list(analysis.notes)})
            return
        typer.echo(str(curve))
        for note in analysis.notes:
            typer.echo(printer.plain(f"note: {note}"))
        if plot is not None:
            typer.echo(f"the curve is drawn in {plot}")


def _check_plot(path: Path | None) -> None:
    check_target(path, "--plot")
    if path is None:
        return
    from tensorize.reports.curve import check_plotting

    check_plotting()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{path} is no .png, .svg or .pdf", param_hint="--plot")
