"""Tables of the pages, as text."""

from __future__ import annotations

import re
from pathlib import Path


def table(page: Path, begins: str) -> list[list[str]]:
    """The cells of the table whose first line begins so: its headers, and then its rows."""
    pattern = rf"^({re.escape(begins)}.*)\n\|[-| ]+\n((?:\|.*\n)+)"
    found = re.search(pattern, page.read_text(encoding="utf-8"), re.M)
    assert found is not None, f"{page.name} has no table that begins with {begins}"
    return [cells(line) for line in (found.group(1), *found.group(2).splitlines())]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]
