"""``tensorize densify``, ``kernels`` and ``graphs``: look into a saved model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.cli import options as option
from tensorize.cli.telling import check_target, errors_told, print_json, say

if TYPE_CHECKING:
    from torch import nn

    from tensorize.cli.sources import Loaded

_WEIGHTS = "model.safetensors"
_TRACED = 16  # tokens that a graph is traced with

Saved = Annotated[
    str, typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False)
]
Dense = Annotated[
    str | None,
    typer.Option(
        help="The dense model that it was made from, where it is one of your own code: "
        "package.module:factory.",
        show_default=False,
    ),
]


def _loaded(directory: str, dense: str | None, dtype: option.Dtype) -> tuple[nn.Module, Loaded]:
    from tensorize.cli.sources import Loaded, load_compressed, load_source, tokenizer_of

    say(f"loading {directory}")
    if dense is None:
        model = tensorize.load(directory)
        return model, Loaded(model, tokenizer_of(directory))
    loaded = load_source(dense, dtype)
    return load_compressed(directory, loaded), loaded


def densify_command(
    directory: Saved,
    out: Annotated[Path, typer.Option(help="Directory to write it to.", show_default=False)],
    dense: Dense = None,
    dtype: option.DtypeOption = option.Dtype.auto,
    as_json: option.Json = False,
) -> None:
    """Write a saved model with dense weights again, which any tool reads."""
    from tensorize.cli.saving import check_out

    with errors_told():
        check_out(out, directory)
        with contextlib.redirect_stdout(sys.stderr):
            model, loaded = _loaded(directory, dense, dtype)
            _write(tensorize.densify(model), loaded, out)
        if as_json:
            print_json({"directory": str(out)})
        else:
            typer.echo(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def _write(model: Any, loaded: Loaded, out: Path) -> None:
    from safetensors.torch import save_model

    from tensorize.cli.saving import save_tokenizer

    try:
        out.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(out)
        else:
            save_model(model, str(out / _WEIGHTS))
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error}", way_out="choose another directory"
        ) from error
    if loaded.tokenizer is not None:
        save_tokenizer(loaded.tokenizer, out)


def kernels_command(
    directory: Saved,
    out: Annotated[
        Path | None, typer.Option(help="Write their sources here.", show_default=False)
    ] = None,
    target: option.Target = None,
    dense: Dense = None,
    dtype: option.DtypeOption = option.Dtype.auto,
    as_json: option.Json = False,
) -> None:
    """List the Triton kernels of a saved model, or write them."""
    from tensorize.cli.saving import check_emit, write_kernels

    with errors_told():
        check_emit(out, target, "--out")
        with contextlib.redirect_stdout(sys.stderr):
            model, _ = _loaded(directory, dense, dtype)
            found = tensorize.kernels(model)
            compiled = (
                None if out is None else write_kernels(model, out, target or [], Path(directory))
            )
        if as_json:
            lines = {name: str(kernel).count("\n") for name, kernel in found.items()}
            print_json({"kernels": lines, "compiled": compiled})
            return
        for name, kernel in found.items():
            typer.echo(f"{name}: {str(kernel).count(chr(10))} lines, {kernel.dtype}")
        typer.echo(f"{len(found)} kernels" + ("" if out is None else f" are in {out}"))


def graphs_command(
    directory: Saved,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the graph after as .svg.", show_default=False)
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Both graphs in full, not what changed.")
    ] = False,
    dense: Dense = None,
    dtype: option.DtypeOption = option.Dtype.auto,
) -> None:
    """Show what the rewrite changed in a saved model's graph."""
    from tensorize.cli.sources import example_tokens

    with errors_told():
        check_target(svg, "--svg")
        with contextlib.redirect_stdout(sys.stderr):
            model, loaded = _loaded(directory, dense, dtype)
            found = tensorize.graphs(model, example_tokens(loaded, _TRACED))
            if svg is not None:
                found.to_svg(svg)
        typer.echo(found.print_readable() if full else found.diff())
        if svg is not None:
            typer.echo(f"the graph is drawn in {svg}")
