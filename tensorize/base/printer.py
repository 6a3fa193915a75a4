"""Plain text for people: quantities and tables."""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Align = Literal["left", "right", "keep", "list", "wrap", "end"]
"""How a column is set: ``left`` (too long: shortened in the middle, for names), ``right`` (for
numbers) and ``keep`` (for figures set left), which are never cut, ``list`` (figures with commas
between them, over several lines), ``wrap`` (prose over several lines), ``end`` (prose cut at its
end)."""

GAP = "  "
USUAL_WIDTH = 100


def line_width() -> int:
    """The length of a line of text for people: that of the terminal, where there is one."""
    return shutil.get_terminal_size((USUAL_WIDTH, 0)).columns


def prose_width() -> int:
    """The length of a line of prose: longer ones are hard to read."""
    return min(line_width(), USUAL_WIDTH)


_ASCII = {
    " · ": " * ", "·": "-", "×": "x", "µ": "u", "→": "->", "…": "...", "–": "-", "−": "-",
    "─": "-", "•": "*", "ᵀ": "^T",
}  # fmt: skip
"""What stands for our own signs where text may go to any pipe or file."""


def plain(text: str) -> str:
    """Text that can be printed anywhere: our own signs in ASCII.

    What else there is (a name, a prompt) stays, where standard output has letters for it.
    """
    if text.isascii():
        return text
    for sign, ascii_ in _ASCII.items():
        text = text.replace(sign, ascii_)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ------------------------------------------------------------------------------------ quantities


def _digits(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits, and no exponent unless it is below 1e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = f"{value:.{digits - 1}e}"
    power = int(rounded.partition("e")[2])  # of the rounded value: 0.9999 is "1.00"
    return rounded if power < -4 else f"{value:.{max(0, digits - 1 - power)}f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    """``value`` over the largest power of 1000 that leaves at least 1, with that power's unit."""
    if not math.isfinite(value):
        return f"{value:g} {units[0]}".strip()
    step = 0
    # 999.5 is already "1.00" of the next unit: three digits are all that is shown.
    while abs(value) >= (999.5 if step else 1000) and step < len(units) - 1:
        value, step = value / 1000, step + 1
    text = _digits(value) if step or value % 1 else f"{value:g}"
    return f"{text} {units[step]}".strip()


def count(n: float) -> str:
    """A number of parameters or FLOPs: ``"768"``, ``"590 K"``, ``"11.7 M"``, ``"1.30 G"``."""
    return _scaled(n, ("", "K", "M", "G", "T", "P", "E"))


def bytes_(n: float) -> str:
    """A size in bytes, in powers of 1000: ``"26.5 MB"``."""
    return _scaled(n, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def percent(x: float) -> str:
    """A share: ``percent(0.1) == "10.0 %"``."""
    return f"{_digits(100 * x)} %"


def seconds(s: float) -> str:
    """A duration: ``"85.0 µs"``, ``"312 ms"``, ``"4.21 s"``, ``"2 min 05 s"``, ``"1 h 03 min"``."""
    if not math.isfinite(s):
        return f"{s:g} s"
    if s >= 3599.5:
        hours, minutes = divmod(round(s / 60), 60)
        return f"{hours} h {minutes:02d} min"
    if s >= 59.95:
        minutes, rest = divmod(round(s), 60)
        return f"{minutes} min {rest:02d} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if s * scale >= 0.9995:
            return f"{_digits(s * scale)} {unit}"
    return f"{_digits(s * 1e9)} ns" if s else "0 s"


def number(x: float | None, digits: int = 3) -> str:
    """An error or a loss with that many significant digits; ``"–"`` where there is none."""
    return "–" if x is None else _digits(x, digits)


def interval(ends: tuple[float, float] | None) -> str:
    """``"0.011 to 0.034"``; ``"–"`` where there is none."""
    return "–" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def plural(n: int, noun: str) -> str:
    """``"1 node"``, ``"2 nodes"``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def each(noun: str) -> str:
    """``"a row"``, ``"an image"``."""
    return f"a{'n' * (noun[0] in 'aeiou')} {noun}"


def shape_text(shape: Sequence[int | str]) -> str:
    """``"3072×768"``; symbolic sizes are given as text."""
    return "×".join(str(size) for size in shape)


def format_text(format: str, ranks: Sequence[int] = (), precision: str | None = None) -> str:
    """A format with its ranks and its bits, if any: ``"dense"``, ``"TT 8·12·8"``, ``"low rank 64
    int8"``.

    A name of two letters stands for two words.
    """
    label = format.upper() if len(format) == 2 else format.replace("_", " ")
    return " ".join(filter(None, (label, "·".join(map(str, ranks)), precision)))


# ---------------------------------------------------------------------------------------- tables


def shorten_middle(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, the middle replaced by one *"""
    if len(text) <= width:
        return text
    # The end of a qualified name tells more than its beginning.
    head = (width - 1) // 2
    tail = width - 1 - head
    return text[:head] + "*" + (text[-tail:] if tail else "")


def shorten_name(name: str, width: int) -> str:
    """A qualified name in at most ``width`` characters, whole parts of it replaced by *

    The numbers (which layer) and the two last parts (which weight) tell names apart, then the first
    part: ``bert.encoder.layer.0.attention.self.query.weight`` becomes
    ``bert.*0.attention.self.query.weight``, then ``bert.*0.*self.query.weight``: shell patterns
    that match it.
    """
    parts = name.split(".") if " " not in name else [name]
    last = len(parts) - 2
    for k in (*range(1, last), 0):
        if len(name) <= width:
            break
        if 0 <= k <= last and not parts[k].isdigit():
            parts[k] = ""
            name = re.sub(r"^\.+|(?<=\.)\.+", "*", ".".join(parts))
    return shorten_middle(name, width)


def shorten_end(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, the end replaced by ..."""
    return text if len(text) <= width else text[: max(width - 3, 0)].rstrip() + "..."[:width]


def _is_number(text: str) -> bool:
    return bool(re.match(r"[-+−]?\d", text)) or text in ("", "–", "nan", "inf", "-inf")


@dataclass(frozen=True)
class _Column:
    """The cells of a column, and its widths: of all that it holds, and the least it can have."""

    title: str
    cells: tuple[str, ...]
    align: Align

    @property
    def figures(self) -> bool:
        return self.align in ("right", "keep", "list")

    @property
    def natural(self) -> int:
        return max(map(len, (self.title, *self.cells)))

    @cached_property
    def least(self) -> int:
        """Figures are not cut, and names tell weights apart."""
        if self.figures:
            parts = (p for c in self.cells for p in (_items(c) if self.align == "list" else (c,)))
            return max(map(len, (*self.title.split(), *parts)), default=1)
        if self.align != "left":
            return 8
        names = set(self.cells)
        longest = max(map(len, names), default=1)
        apart = (
            width
            for width in range(8, longest)
            if len({shorten_name(name, width) for name in names}) == len(names)
        )
        return next(apart, longest)

    def lines(self, cell: str, width: int) -> list[str]:
        if self.align == "wrap":
            return textwrap.wrap(cell, width) or [""]
        if self.align == "left":
            return [shorten_name(cell, width)]
        if self.align == "end":
            return [shorten_end(cell, width)]
        if self.align != "list":
            return [cell]
        found = [""]
        for item in _items(cell):
            longer = f"{found[-1]} {item}".strip()
            if len(longer) <= width or not found[-1]:
                found[-1] = longer
            else:
                found.append(item)
        return found

    def title_lines(self, width: int) -> list[str]:
        if self.figures:
            return textwrap.wrap(self.title, width) or [""]
        return [shorten_end(self.title, width)]


def _items(cell: str) -> list[str]:
    """Figures with commas between them, each with its comma."""
    *others, last = cell.split(", ")
    return [*(f"{other}," for other in others), last]


def _fit(columns: Sequence[_Column], room: int) -> list[int]:
    """Column widths that sum to at most ``room``, or the least that there can be.

    Text gives way in proportion to its length, then titles of figures are set in several lines.
    """
    natural = [column.natural for column in columns]
    widths = list(natural)
    text = [k for k, column in enumerate(columns) if not column.figures]
    figures = [k for k, column in enumerate(columns) if column.figures]
    for chosen in (text, figures):
        while sum(widths) > room:
            open_ = [k for k in chosen if widths[k] > columns[k].least]
            if not open_:
                break
            widths[max(open_, key=lambda k: (widths[k] / min(natural[k], 60), widths[k]))] -= 1
    return widths


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    width: int | None = None,
    align: Sequence[Align] | None = None,
) -> str:
    """A table in ASCII, but for names and prose in other letters.

    Args:
        headers: one title a column.
        rows: cells, by row; anything with a ``str()``.
        width: the length of a line (None: that of the terminal). No figure is cut and no two names
            are made one for it: a table that needs more is wider.
        align: how each column is set (see ``Align``); without it columns of numbers are set right,
            others left.

    Raises:
        ValueError: a row or ``align`` has another length than ``headers``.
    """
    titles = [" ".join(plain(str(title)).split()) for title in headers]
    cells = [[" ".join(plain(str(cell)).split()) for cell in row] for row in rows]
    size = len(titles)
    if not size or any(len(row) != size for row in cells):
        raise ValueError(f"every row of a table needs {size} cells, one for each of {titles}")
    by_column = list(zip(*cells, strict=True)) if cells else [()] * size
    if align is None:
        align = ["right" if c and all(map(_is_number, c)) else "left" for c in by_column]
    if len(align) != size:
        raise ValueError(f"align needs {size} entries, one a column, got {list(align)}")
    columns = [_Column(*each) for each in zip(titles, by_column, align, strict=True)]
    room = (width or line_width()) - len(GAP) * (size - 1)
    widths = _fit(columns, room)

    def set_lines(parts: Sequence[Sequence[str]]) -> Iterator[str]:
        for k in range(max(map(len, parts))):
            line = [p[k] if k < len(p) else "" for p in parts]
            yield GAP.join(
                text.rjust(w) if column.align == "right" else text.ljust(w)
                for text, column, w in zip(line, columns, widths, strict=True)
            ).rstrip()

    both = list(zip(columns, widths, strict=True))
    lines = list(set_lines([column.title_lines(w) for column, w in both]))
    lines.append(GAP.join("-" * w for w in widths))
    for row in cells:
        lines.extend(set_lines([c.lines(t, w) for t, (c, w) in zip(row, both, strict=True)]))
    return "\n".join(lines)
