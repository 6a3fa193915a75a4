"""Set-up for the tests of checkpoints compressed a weight at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorize.api import analysis
from tests.api.checkpoints import llama, saved


@pytest.fixture
def a_short_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder of budgets in a report takes ten times the rest of these small models."""
    monkeypatch.setattr(analysis, "CURVE_BUDGETS", (0.5,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "dense")
