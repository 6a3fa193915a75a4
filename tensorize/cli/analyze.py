"""``tensorize analyze``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tensorize.api.analyze import analyzed
from tensorize.api.options import Options
from tensorize.cli import options as option
from tensorize.cli.parse import parse_shares, read_options
from tensorize.cli.sources import Dtype
from tensorize.cli.telling import (
    check_target,
    count_text,
    errors_told,
    load_result,
    print_json,
    say,
)
from tensorize.reports.curve import check_plotting


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
    seed: option.Seed = Options.seed,
    cache_dir: option.Cache = None,
    max_memory: option.MaxMemory = None,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = Dtype.auto,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the curve: .png, .svg or .pdf.", show_default=False),
    ] = None,
    as_json: option.Json = False,
) -> None:
    """Predict quality, size and cost for several budgets, without compressing anything."""
    with errors_told():
        options = read_options(locals())
        shares = None if budgets is None else parse_shares(budgets)
        _check_plot(plot)
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = load_result(source, dtype, calibration, batch_size, max_length)
            say(f"analysing {count_text(loaded.model)} parameters")
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
            typer.echo(f"note: {note}")
        if plot is not None:
            typer.echo(f"the curve is drawn in {plot}")


def _check_plot(path: Path | None) -> None:
    check_target(path, "--plot")
    if path is None:
        return
    check_plotting()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{path} is no .png, .svg or .pdf", param_hint="--plot")
