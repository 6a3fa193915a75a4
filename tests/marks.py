"""Parameters whose tests take long: ``make test`` leaves them out, ``make test-all`` has them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of parameters."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(fast: Container[str], names: Iterable[str]) -> list[Any]:
    """Names, of which only some are fast."""
    return [name if name in fast else slow(name) for name in names]
