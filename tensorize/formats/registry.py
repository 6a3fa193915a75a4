"""The table of formats: each by its name, in the order in which they are listed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensorize.formats import packs
from tensorize.formats.block import Block
from tensorize.formats.dense import Dense
from tensorize.formats.format import OTHER_COLORS, Format
from tensorize.formats.low_rank import LowRank
from tensorize.formats.quantized import Quantized
from tensorize.formats.shared import Shared
from tensorize.formats.train import Train
from tensorize.ir.spec import READERS, Spec

_TABLE: dict[str, Format[Any]] = {
    form.name: form for form in (Dense(), LowRank(), Shared(), Train(), Block())
}
_IN_CODES = {name: Quantized(form) for name, form in _TABLE.items()}


@torch.library.impl(packs.OPERATION.name(), "cpu", lib=packs.library)
def _(x: Tensor, held: list[Tensor], contract: str, spec: str) -> Tensor:
    found: Any = packs.from_text(spec)
    return _IN_CODES[found.format].by_packs(found, held, x, contract)


def format_of(spec: Spec) -> Format[Any]:
    """The format of a factorized weight."""
    return (_TABLE if spec.precision is None else _IN_CODES)[spec.format]


def named(name: str) -> Format[Any]:
    """The format of a name.

    Raises:
        KeyError: there is none.
    """
    return _TABLE[name]


def colors_of(name: str) -> tuple[str, str]:
    """Stroke and fill of a format in pictures, and of what is none."""
    return _TABLE[name].colors if name in _TABLE else OTHER_COLORS


def formats() -> tuple[Format[Any], ...]:
    """All of them."""
    return tuple(_TABLE.values())


def names() -> tuple[str, ...]:
    """What ``formats=`` may say."""
    return tuple(_TABLE)


def register(form: Format[Any]) -> None:
    """Add a format.

    Raises:
        ValueError: there is one of its name.
    """
    if form.name in _TABLE:
        raise ValueError(f"there is a format {form.name!r} already")
    _TABLE[form.name], _IN_CODES[form.name] = form, Quantized(form)
    READERS[form.name] = form.read


def withdraw(name: str) -> None:
    """Take a format that was added out again."""
    del _TABLE[name], _IN_CODES[name], READERS[name]
