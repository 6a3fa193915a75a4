"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tensorize.cli.sources import Dtype


class Refine(StrEnum):
    """What is done to the factors after the decompositions."""

    auto = "auto"
    none = "none"
    refit = "refit"
    polish = "polish"


class Backend(StrEnum):
    """What weights run by."""

    auto = "auto"
    aten = "aten"
    triton = "triton"
    inductor = "inductor"


class Metric(StrEnum):
    """How a weight's error is weighed."""

    frobenius = "frobenius"
    input = "input"
    loss = "loss"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face directory or id, or package.module:factory.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="A text file (documents are separated by blank lines, or are lines), or a "
        ".safetensors file with a tensor for each input, whose first axis is the sample; or self: "
        "the model makes its own.",
        show_default=False,
    ),
]
RefineOption = Annotated[
    Refine, typer.Option(help="What is done to the factors with the calibration data.")
]
MetricOption = Annotated[
    Metric | None,
    typer.Option(
        help="Default: loss; frobenius (the weights alone) where there are no calibration data and "
        "the model is too large to make some unasked.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Shell pattern of weights to consider; repeatable.", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Shell pattern of weights to leave dense; repeatable.", show_default=False),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        help="dense, low_rank, shared, tt or block, or PATTERN=FORMAT,...; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the probes.")]
Cache = Annotated[
    Path | None, typer.Option(help="Directory that keeps analyses.", show_default=False)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="The most that second moments may take at once, as 4GB: weights are then analysed in "
        "groups, to the same bits.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
