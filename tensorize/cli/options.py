"""Options that several commands have: what is read to show help, and so nothing heavy."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tensorize.ir import choices


class Dtype(StrEnum):
    """The dtype to load the weights in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _left_open(help: str, *flags: str) -> Any:
    """An option whose default is to leave the choice open."""
    return typer.Option(*flags, help=help, show_default=False)


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
Budget = Annotated[
    str,
    typer.Option(
        help="Share of the parameters to keep as 0.3 or 30%, a size as 10MB, auto (the smallest "
        "model that is predicted to lose next to nothing), or limits as params=0.3,bytes=2e6, also "
        "of flops, latency, error, loss (up to 1: a share; above: an absolute number)."
    ),
]
Calibration = Annotated[
    Path | None,
    _left_open(
        "A text file (documents are separated by blank lines, or are lines), or a "
        ".safetensors file with a tensor for each input, whose first axis is the sample; or self: "
        "the model makes its own."
    ),
]
Metric = Annotated[
    choices.Metric | None,
    _left_open(
        "Default: loss; frobenius (the weights alone) where there are no calibration data and "
        "the model is too large to make some unasked."
    ),
]
Refine = Annotated[
    Literal["auto", "none", "refit", "polish"],
    typer.Option(help="What is done to the factors with the calibration data."),
]
Include = Annotated[
    list[str] | None, _left_open("Shell pattern of weights to consider; repeatable.")
]
Exclude = Annotated[
    list[str] | None, _left_open("Shell pattern of weights to leave dense; repeatable.")
]
Formats = Annotated[
    list[str] | None,
    _left_open("dense, low_rank, shared, tt or block, or PATTERN=FORMAT,...; repeatable."),
]
Precision = Annotated[
    list[str] | None,
    _left_open(
        "Bits of the weights: auto, or int8, int4, int3, int2; repeatable. A budget that is a "
        "share is then one of the bytes."
    ),
]
Activations = Annotated[
    choices.Activations | None,
    _left_open(
        "What inputs of quantized weights are rounded to on a CPU: int8, int16, or float "
        "(nothing, and weights are made numbers at every call). Default: what is good and fast."
    ),
]
Backend = Annotated[
    choices.Backend,
    typer.Option(
        help="What weights run by once the model is loaded: torch's matmuls (aten), kernels "
        "(triton), or kernels where they were measured to be faster (auto)."
    ),
]
Autotune = Annotated[
    bool, typer.Option(help="Time the contraction orders of tensor trains on this machine.")
]
Seed = Annotated[int, typer.Option(help="Seed of the probes.")]
Cache = Annotated[Path | None, _left_open("Directory that keeps analyses.", "--cache")]
Scratch = Annotated[
    Path | None, _left_open("With --stream: where activations lie meanwhile (default: in --out).")
]
MaxMemory = Annotated[
    str | None,
    _left_open(
        "The most that second moments may take at once, as 4GB: weights are then analysed in "
        "groups, to the same bits."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
