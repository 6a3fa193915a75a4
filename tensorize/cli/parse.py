"""The record of options from what is written on a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import typer

from tensorize.api.options import Options
from tensorize.base.errors import BudgetError
from tensorize.ir.budget import AUTO, Budget, as_written, parse_bytes


def read_options(given: Mapping[str, Any]) -> Options:
    """The options among the arguments of a command, ``locals()`` at its start.

    Calibration data are read with the model, later.

    Raises:
        typer.BadParameter: a text cannot be read.
        TensorizeError: an option has a value that it cannot have.
    """
    read = {name: _READ[name](value) for name, value in given.items() if name in _READ}
    return Options.of({**given, **read, "calibration": None})


def parse_budget(text: str) -> Budget | float | str:
    """``0.3``, ``30%``, ``10MB``, ``auto``, or ``params=0.3,error=0.05,bytes=2e6``.

    After a name, a cost up to 1 is a share, else absolute.

    A share alone is one of whatever the other options say.

    Raises:
        typer.BadParameter: the text is no budget.
        BudgetError: its numbers make no sense.
    """
    known = [f.name for f in fields(Budget)]
    if "=" not in text:
        written = as_written(text)
        if text.strip() == AUTO or not isinstance(written, str):
            return text.strip()
        share = _number(text, "--budget")
        Budget.of(share)
        return share
    limits: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value or name in limits:
            raise typer.BadParameter(
                f"{part.strip()!r} is not NAME=NUMBER with a new NAME among {', '.join(known)}",
                param_hint="--budget",
            )
        number = _number(value, "--budget")
        absolute = name not in ("error", "loss") and number > 1 and number.is_integer()
        limits[name] = int(number) if absolute else number
    return Budget(**limits)


def parse_shares(text: str) -> list[float]:
    """``0.1,0.25,0.5`` as shares in (0, 1].

    Raises:
        typer.BadParameter: one of them is no number.
        BudgetError: one of them is no share.
    """
    shares = [_number(part, "--budgets") for part in text.split(",")]
    for share in shares:
        Budget.of(share)
    return shares


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text.strip()!r} is no number", param_hint=option) from None


def parse_formats(texts: Sequence[str] | None) -> list[str] | dict[str, list[str]] | None:
    """Format names for all weights, or pattern → names.

    Raises:
        typer.BadParameter: some of the texts have a pattern and others have none.
    """
    if not texts:
        return None
    if not any("=" in text for text in texts):
        return [name.strip() for text in texts for name in text.split(",")]
    chosen: dict[str, list[str]] = {}
    for text in texts:
        pattern, equals, names = text.rpartition("=")
        if not equals:
            raise typer.BadParameter(
                "give formats for all weights, or a pattern with each", param_hint="--formats"
            )
        chosen[pattern.strip()] = [name.strip() for name in names.split(",")]
    return chosen


def parse_precision(texts: Sequence[str] | None) -> str | list[str] | None:
    """Names of precisions, or one."""
    names = [name.strip() for text in texts or () for name in text.split(",")]
    return names[0] if len(names) == 1 else names or None


def _parse_size(text: str | None) -> int | None:
    try:
        return parse_bytes(text)
    except BudgetError as error:
        raise typer.BadParameter(str(error), param_hint="--max-memory") from error


_READ: Mapping[str, Callable[[Any], Any]] = {
    "budget": parse_budget,
    "refine": lambda name: None if name == "none" else name,
    "include": lambda patterns: patterns or None,
    "exclude": lambda patterns: patterns or None,
    "formats": parse_formats,
    "precision": parse_precision,
    "max_memory": _parse_size,
}
"""How texts become options; what is not named is one as it is."""
