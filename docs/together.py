"""For the reference: parameters of one meaning, which stand in one line of a docstring, one by one.

An extension of griffe, which reads docstrings for mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports] -- only where the documentation is built

_TOGETHER = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+):( .+)$", re.M)


def apart(text: str) -> str:
    """``a, b: x`` as ``a: x`` and ``b: x``."""

    def each(line: re.Match[str]) -> str:
        indent, names, meaning = line.groups()
        return "\n".join(f"{indent}{name}:{meaning}" for name in names.split(", "))

    return _TOGETHER.sub(each, text)


class Together(griffe.Extension):
    """Does so for every function."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = apart(func.docstring.value)
