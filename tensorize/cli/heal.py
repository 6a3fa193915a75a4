"""``tensorize heal``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import tensorize
from tensorize.base.records import plain
from tensorize.cli import options as option
from tensorize.cli.telling import errors_told, print_json, say


def heal_command(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    dense: option.DenseModel,
    data: Annotated[
        Path,
        typer.Option(
            help="What to train on: a file as for --calibration of compile.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to save the result in.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="Steps, of a batch each.")] = 300,
    train: Annotated[
        Literal["cores", "all"],
        typer.Option(help="What is trained: factors, or biases, norms and dense weights as well."),
    ] = "cores",
    seed: option.Seed = 0,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = option.Dtype.auto,
    as_json: option.Json = False,
) -> None:
    """Train the factors of a saved model on to the dense one's outputs, and save it."""
    from tensorize.cli.saving import check_out, save_tokenizer
    from tensorize.cli.sources import load_compressed, load_told, read_batches

    with errors_told():
        check_out(out, source)
        with contextlib.redirect_stdout(sys.stderr):
            loaded, _ = load_told(dense, dtype, None, batch_size, max_length)
            batches = read_batches(data, loaded, batch_size, max_length)
            model = load_compressed(source, loaded)
            say(f"healing on {len(batches)} batches from {data}")
            found = tensorize.heal(
                model, loaded.model, batches, steps=steps, train=train, seed=seed
            )
            tensorize.save(model, out)
            if loaded.tokenizer is not None:
                save_tokenizer(loaded.tokenizer, out)
        verdict = tensorize.report(model).verdict
        if as_json:
            print_json({"directory": str(out), "healing": plain(found), "verdict": verdict.lines})
            return
        typer.echo(str(found))
        typer.echo(str(verdict))
        typer.echo(f"saved in {out}")
