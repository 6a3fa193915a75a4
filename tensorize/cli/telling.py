"""How commands speak: output, errors and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from tensorize.base import printer, progress
from tensorize.base.errors import BudgetError, CheckpointError, TensorizeError
from tensorize.cli import INTERRUPTED

DEFECT, USAGE, CAPTURE, BUDGET, CHECKPOINT = 1, 2, 3, 4, 5


def parse_counts(text: str, option: str) -> list[int]:
    """``1,16,256`` as numbers."""
    counts = [int(count) for count in text.split(",") if count.strip().isdigit() and int(count)]
    if len(counts) != len(text.split(",")):
        raise typer.BadParameter(f"{text!r} is no list of numbers as 1,16,256", param_hint=option)
    return counts


def check_target(path: Path | None, option: str) -> None:
    """Found out before the long work: whether the file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint=option)


def say(line: str) -> None:
    """Something on the way, for people who want to hear it."""
    if not progress.is_quiet():
        typer.echo(printer.plain(f"tensorize: {line}"), err=True)


def print_json(data: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=1, allow_nan=False))


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """An error as one message and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("TENSORIZE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        typer.secho("error: ", err=True, nl=False, fg="red", bold=True)
        if isinstance(error, TensorizeError):
            typer.echo(str(error), err=True)
        else:
            typer.echo(
                f"{type(error).__name__}: {error}\n  this is a defect in tensorize: "
                "TENSORIZE_DEBUG=1 shows where",
                err=True,
            )
        raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: Exception) -> int:
    if isinstance(error, BudgetError):
        return BUDGET
    if isinstance(error, CheckpointError):
        return CHECKPOINT
    return CAPTURE if isinstance(error, TensorizeError) else DEFECT
