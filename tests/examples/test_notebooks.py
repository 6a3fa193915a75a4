"""The notebooks: without outputs, and every cell runs and shows what it ends in."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_kept(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_the_documentation_names_them() -> None:
    page = (ROOT / "docs/notebooks.md").read_text()
    assert len(NOTEBOOKS) == 2
    assert all(f"`{path.name}`" in page for path in NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)  # as notebooks do
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run("".join(cell["source"]), path.name, names) for cell in cells(path, "code")]
    pages = [each for each in shown if each is not None]
    assert any("<iframe" in page for page in pages)  # the report
    assert any("<table" in page for page in pages)  # the curve


def run(source: str, name: str, names: dict[str, Any]) -> str | None:
    """Run a cell; what a notebook would show of its last expression."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return value._repr_html_() if hasattr(value, "_repr_html_") else None
