"""Options that several commands have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tensorize.api import options
from tensorize.cli.sources import Dtype

_FIELDS = {each.name: each for each in fields(options.Options)}


def _of(name: str, *flags: str) -> Any:
    """An option of the library, in the words of its record."""
    each = _FIELDS[name]
    return typer.Option(*flags, help=each.metadata["help"], show_default=each.default is not None)


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face directory or id, or package.module:factory.",
        show_default=False,
    ),
]
DenseModel = Annotated[
    str,
    typer.Option(
        help="The dense model: a Hugging Face directory or id, or package.module:factory.",
        show_default=False,
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        help="Compile them for it: cuda:80, cuda:90, cuda:100, hip:gfx90a or hip:gfx942, which "
        "need not be here; repeatable.",
        show_default=False,
    ),
]
Budget = Annotated[str, _of("budget")]
Calibration = Annotated[Path | None, _of("calibration")]
Metric = Annotated[options.Metric | None, _of("metric")]
Refine = Annotated[Literal["auto", "none", "refit", "polish"], _of("refine")]
Include = Annotated[list[str] | None, _of("include")]
Exclude = Annotated[list[str] | None, _of("exclude")]
Formats = Annotated[list[str] | None, _of("formats")]
Precision = Annotated[list[str] | None, _of("precision")]
Activations = Annotated[options.Activations | None, _of("activations")]
Backend = Annotated[options.Backend, _of("backend")]
Autotune = Annotated[bool, _of("autotune")]
Seed = Annotated[int, _of("seed")]
Cache = Annotated[Path | None, _of("cache_dir", "--cache")]
Scratch = Annotated[Path | None, _of("scratch")]
MaxMemory = Annotated[str | None, _of("max_memory")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
