"""What is written beside a saved model, and what is looked at before the long work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from torch import nn

import tensorize
from tensorize.base.errors import CheckpointError, TensorizeError
from tensorize.cli.telling import say
from tensorize.codegen.device import kernel
from tensorize.codegen.device.compiler import TARGETS, check_compiler
from tensorize.store.transformers_config import check_place


def check_emit(emit: Path | None, targets: list[str] | None, option: str = "--emit") -> None:
    """Found out before the long work: whether kernels can be written and compiled."""
    if targets and emit is None:
        raise typer.BadParameter(f"says what {option} compiles; give both", param_hint="--target")
    for target in targets or ():
        if target not in TARGETS:
            raise typer.BadParameter(
                f"{target!r} is not one of {', '.join(TARGETS)}", param_hint="--target"
            )
    if emit is not None and emit.exists() and not emit.is_dir():
        raise typer.BadParameter(f"{emit} is not a directory", param_hint=option)
    if targets:
        check_compiler()


def write_kernels(
    model: nn.Module, directory: Path, targets: list[str], out: Path
) -> dict[str, dict[str, dict[str, int]]]:
    """Write the kernels of a model that is saved in ``out``, and what they need on each target."""
    found = tensorize.kernels(model)
    say(f"writing {len(found)} kernels for {', '.join(targets) or 'reading'}")
    try:
        return kernel.write(found, directory, targets)
    except (OSError, TensorizeError) as error:
        raise CheckpointError(
            f"the model is saved in {out}, its kernels are not: {error}",
            way_out="load it from there, and write tensorize.kernels(model) to another place",
        ) from error


def check_out(out: Path, source: str) -> None:
    """Found out before the long work: whether a model can be saved there."""
    if os.path.isdir(source) and out.exists() and os.path.samefile(out, source):
        raise typer.BadParameter("is the model's own directory; choose another", param_hint="--out")
    check_place(out)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(
            f"{out} cannot be written: {place} is not a directory that you may write to",
            way_out="choose another directory with --out",
        )


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Beside a model that is saved there."""
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise CheckpointError(
            f"the model is saved in {out}, its tokenizer is not: {error}",
            way_out="copy the tokenizer's files there",
        ) from error
