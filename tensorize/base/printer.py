"""Plain text for people: quantities and tables."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

Align = Literal["left", "right", "keep", "wrap", "end"]
"""How a column is set: ``left`` (too long: shortened in the middle, for names), ``right`` (for
numbers) and ``keep`` (for figures set left), which give way last, ``wrap`` (prose over several
lines), ``end`` (prose cut at its end)."""

GAP = "  "
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
    text = _digits(value) if step else f"{value:g}"
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


def shape_text(shape: Sequence[int | str]) -> str:
    """``"3072×768"``; symbolic sizes are given as text."""
    return "×".join(str(size) for size in shape)


def format_text(format: str, ranks: Sequence[int] = ()) -> str:
    """A format with its ranks, if any: ``"dense"``, ``"low rank 64"``, ``"TT 8·12·8"``.

    A name of two letters stands for two words.
    """
    label = format.upper() if len(format) == 2 else format.replace("_", " ")
    return f"{label} {'·'.join(map(str, ranks))}" if ranks else label


# ---------------------------------------------------------------------------------------- tables


def shorten_middle(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, the middle replaced by one …"""
    if len(text) <= width:
        return text
    # The end of a qualified name tells more than its beginning.
    head = (width - 1) // 2
    tail = width - 1 - head
    return text[:head] + "…" + (text[-tail:] if tail else "")


def shorten_name(name: str, width: int) -> str:
    """A qualified name in at most ``width`` characters, whole parts of it replaced by …

    The numbers (which layer) and the two last parts (which weight) tell names apart, then the first
    part: ``bert.encoder.layer.0.attention.self.query.weight`` becomes
    ``bert.…0.attention.self.query.weight``, then ``bert.…0.…self.query.weight``.
    """
    parts = name.split(".") if " " not in name else [name]
    last = len(parts) - 2
    for k in (*range(1, last), 0, last):
        if len(name) <= width:
            break
        if 0 <= k <= last and not parts[k].isdigit():
            parts[k] = ""
            name = re.sub(r"^\.+|(?<=\.)\.+", "…", ".".join(parts))
    return shorten_middle(name, width)


def shorten_end(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, the end replaced by one …"""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _is_number(text: str) -> bool:
    return bool(re.match(r"[-+−]?\d", text)) or text in ("", "–", "nan", "inf", "-inf")


def _fit(natural: Sequence[int], align: Sequence[Align], room: int) -> list[int]:
    """Column widths that sum to at most ``room``.

    Text gives way in proportion to its length, down to 8 characters; figures give way last.
    """
    widths = list(natural)
    text = [k for k, how in enumerate(align) if how not in ("right", "keep")]
    for least, columns in ((8, text), (1, text), (1, list(range(len(align))))):
        while sum(widths) > room:
            open_ = [k for k in columns if widths[k] > least]
            if not open_:
                break
            widths[max(open_, key=lambda k: (widths[k] / min(natural[k], 60), widths[k]))] -= 1
    return widths


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    width: int = 100,
    align: Sequence[Align] | None = None,
) -> str:
    """A plain text table of at most ``width`` columns.

    Args:
        headers: one title a column.
        rows: cells, by row; anything with a ``str()``.
        width: the largest length of a line.
        align: how each column is set (see ``Align``); without it columns of numbers are set right,
            others left.

    Raises:
        ValueError: a row or ``align`` has another length than ``headers``, or ``width`` leaves
            less than one character a column.
    """
    titles = [" ".join(str(title).split()) for title in headers]
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    size = len(titles)
    if not size or any(len(row) != size for row in cells):
        raise ValueError(f"every row of a table needs {size} cells, one for each of {titles}")
    columns = list(zip(*cells, strict=True)) if cells else [()] * size
    if align is None:
        align = ["right" if c and all(map(_is_number, c)) else "left" for c in columns]
    if len(align) != size:
        raise ValueError(f"align needs {size} entries, one a column, got {list(align)}")
    room = width - len(GAP) * (size - 1)
    if room < size:
        raise ValueError(f"{size} columns do not fit into a width of {width}")
    natural = [max(map(len, (title, *c))) for title, c in zip(titles, columns, strict=True)]
    widths = _fit(natural, align, room)

    def lines_of(text: str, how: Align, fit: int) -> list[str]:
        if how == "wrap":
            return textwrap.wrap(text, fit) or [""]
        return [shorten_name(text, fit) if how == "left" else shorten_end(text, fit)]

    def set_row(row: Sequence[str], how: Sequence[Align]) -> Iterator[str]:
        parts = [lines_of(t, a, w) for t, a, w in zip(row, how, widths, strict=True)]
        for k in range(max(map(len, parts))):
            line = [p[k] if k < len(p) else "" for p in parts]
            yield GAP.join(
                text.rjust(w) if a == "right" else text.ljust(w)
                for text, a, w in zip(line, align, widths, strict=True)
            ).rstrip()

    cut: list[Align] = ["end"] * size
    lines = list(set_row(titles, cut))
    lines.append(GAP.join("─" * w for w in widths))
    for row in cells:
        lines.extend(set_row(row, align))
    return "\n".join(lines)
