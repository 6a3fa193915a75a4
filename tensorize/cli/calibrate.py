"""``tensorize calibrate``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import tensorize
from tensorize.base.errors import TensorizeError
from tensorize.base.records import plain
from tensorize.cli.options import Json
from tensorize.cli.telling import errors_told, parse_counts, print_json
from tensorize.codegen.machine import rates
from tensorize.running import tuning

_ROWS = ",".join(map(str, tuning.ROWS))


def calibrate_command(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Time the kernels of a saved model instead, on the GPU of this machine: models "
            "loaded afterwards run by those that beat the library, and wait for none.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="With --model: how many rows to time kernels for.")
    ] = _ROWS,
    as_json: Json = False,
) -> None:
    """Measure what matmuls cost on this machine; plans are then made for it."""
    with errors_told():
        if model is not None:
            _calibrate_kernels(model, rows, as_json)
            return
        if rows != _ROWS:
            raise typer.BadParameter("is for kernels; give --model as well", param_hint="--rows")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measured = rates.measure(device)
        path = rates.keep(measured, device)
        if as_json:
            print_json(plain(measured))
            return
        typer.echo(str(measured))
        typer.echo(f"kept in {path}")


def _calibrate_kernels(directory: Path, rows: str, as_json: bool) -> None:
    counts = parse_counts(rows, "--rows")
    if not torch.cuda.is_available():
        raise TensorizeError(
            "kernels are timed on a GPU, and this machine has none",
            way_out="run it where the model will run; without --model this machine is measured",
        )
    with contextlib.redirect_stdout(sys.stderr):
        loaded = tensorize.load(directory, device="cuda")
        won = tensorize.tune_kernels(loaded, counts)
    found = tensorize.report(loaded)
    if as_json:
        runs_by = {site.name: plain(site.runs_by) for site in found.sites}
        print_json({"won": won, "sites": runs_by})
        return
    typer.echo(f"{won} kernels won")
    for line in found.running:
        typer.echo(f"  {line}")
