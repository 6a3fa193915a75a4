"""Set-up for the tests of the command line: an empty directory to work in."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from tests.cli.commands import NET


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory to work in, with a module of models; nothing is left behind in Python."""
    (tmp_path / "clinet.py").write_text(textwrap.dedent(NET))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TENSORIZE_DEBUG", raising=False)
    monkeypatch.delitem(sys.modules, "clinet", raising=False)
