"""The pages of docs/measured name constants: each is where the page says, with that value."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.paths import ROOT

PAGES = sorted((ROOT / "docs/measured").glob("*.md"))
# - `NAME = value` (`folder/file.py`), several before one file among them
ENTRY = re.compile(r"((?:`_?[A-Z][A-Z_0-9]+[^`]*`(?:, | and )?)+) \(`([a-z_/]+\.py)`")
NAME = re.compile(r"_?[A-Z][A-Z_0-9]+\b")


def constants_of(path: Path) -> dict[str, str]:
    """The module's constants as they are written."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        values = [node.value]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            values = node.value.elts
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        found |= dict(zip(map(ast.unparse, targets), map(ast.unparse, values), strict=False))
    return found


def entries(page: Path) -> list[tuple[str, str, str]]:
    """Name, value and file of every constant that a page lists."""
    found = []
    for text, file in ENTRY.findall(re.sub(r"\s+", " ", page.read_text())):
        for assigned in re.findall(r"`([^`]+)`", text):
            names, equals, values = assigned.partition(" = ")
            if equals and "…" not in values:  # a long table is cut
                found.append((names, values, file))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_constants_have_the_value_that_a_page_tells(page: Path) -> None:
    for names, values, file in entries(page):
        known = constants_of(ROOT / file)
        missing = [name for name in names.split(", ") if name not in known]
        assert not missing, f"{file} has no {missing}"
        told = ast.unparse(ast.parse(values, mode="eval"))
        if "," not in names:
            assert known[names] == told, f"{file}: {names} is {known[names]}, not {told}"


def test_pages_list_constants() -> None:
    assert sum(len(entries(page)) for page in PAGES) > 80
