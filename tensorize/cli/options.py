"""Options that several commands have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tensorize.api import options
from tensorize.cli.sources import Dtype

_HELP = {each.name: each.metadata.get("help", "") for each in fields(options.Options)}


def _of(name: str, *flags: str, show_default: bool = False) -> Any:
    """An option of the library, in the words of its record."""
    return typer.Option(*flags, help=_HELP[name], show_default=show_default)


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face directory or id, or package.module:factory.",
        show_default=False,
    ),
]
Budget = Annotated[str, _of("budget", show_default=True)]
Calibration = Annotated[Path | None, _of("calibration")]
Metric = Annotated[options.Metric | None, _of("metric")]
Refine = Annotated[Literal["auto", "none", "refit", "polish"], _of("refine", show_default=True)]
Include = Annotated[list[str] | None, _of("include")]
Exclude = Annotated[list[str] | None, _of("exclude")]
Formats = Annotated[list[str] | None, _of("formats")]
Backend = Annotated[options.Backend, _of("backend", show_default=True)]
Autotune = Annotated[bool, _of("autotune", show_default=True)]
Seed = Annotated[int, _of("seed", show_default=True)]
Cache = Annotated[Path | None, _of("cache_dir", "--cache")]
MaxMemory = Annotated[str | None, _of("max_memory")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
