"""``tensorize calibrate`` and ``doctor``: this machine, measured and looked at."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import tensorize
from tensorize.base import printer
from tensorize.base.errors import TensorizeError
from tensorize.base.records import plain
from tensorize.cli.options import Json
from tensorize.cli.telling import errors_told, parse_counts, print_json


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
        str | None,
        typer.Option(
            help="With --model: how many rows to time kernels for, as 1,16,256.",
            show_default=False,
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Measure a group of processes instead, which torchrun starts: what they send and "
            'compute in how much time, for tensorize.distributed.plan(machine="measured").',
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what matmuls cost on this machine; plans are then made for it."""
    import torch

    from tensorize.codegen.machine import rates

    with errors_told():
        if distributed:
            _calibrate_group(as_json)
            return
        if model is not None:
            _calibrate_kernels(model, rows, as_json)
            return
        if rows is not None:
            raise typer.BadParameter("is for kernels; give --model as well", param_hint="--rows")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measured = rates.measure(device)
        path = rates.keep(measured, device)
        if as_json:
            print_json(plain(measured))
            return
        typer.echo(str(measured))
        typer.echo(f"kept in {path}")


def doctor_command(as_json: Json = False) -> None:
    """Look at this machine: what is installed, what is known of it, what will be fast."""
    from tensorize.cli.findings import findings

    with errors_told():
        found = list(findings())
        if as_json:
            print_json({"findings": [plain(each) for each in found]})
            return
        width = max(len(each.name) for each in found)
        for each in found:
            typer.echo(printer.plain(f"{each.name.ljust(width)}  {each.found}"))
            if each.advice is not None:
                typer.echo(printer.plain(f"{' ' * width}  -> {each.advice}"))


def _calibrate_kernels(directory: Path, rows: str | None, as_json: bool) -> None:
    import torch

    from tensorize.running.tuning import ROWS

    counts = ROWS if rows is None else parse_counts(rows, "--rows")
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


def _calibrate_group(as_json: bool) -> None:
    import torch
    from torch import distributed

    from tensorize.distributed.strategy import cluster, measure

    if "RANK" not in os.environ:
        raise TensorizeError(
            "torchrun starts a group of processes, and it did not start this one",
            way_out="torchrun --nproc-per-node 2 -m tensorize.cli calibrate --distributed",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        found = measure.measure(device)
        if distributed.get_rank() == 0:
            path = cluster.keep(found)
            if as_json:
                print_json(plain(found))
            else:
                typer.echo(f"{found}\nkept in {path}")
    finally:
        distributed.destroy_process_group()
