"""Two graphs side by side as a picture (SVG)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from tensorize.base import printer
from tensorize.base.html import environment
from tensorize.formats.registry import colors_of, formats
from tensorize.graphview.boxes import (
    OTHER,
    SITE,
    Box,
    Repeat,
    View,
    chained,
    collapse,
    fold,
    shapes_of,
)


def draw(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """The graph after a rewrite as one self-contained SVG picture; ``before`` knows dense shapes.

    What it reads in ``gm.meta`` is said in ``graphs.Graphs``.
    """
    boxes = collapse(after, shapes_of(before))
    return _svg(_layout(chained(fold(boxes))))


_CHARACTER, _SMALL = 7.3, 6.7  # widths of a title's and a subtitle's character
_GAP_X, _GAP_Y, _MARGIN = 26.0, 30.0, 28.0
_FRAME, _FRAME_TITLE = 16.0, 26.0
_LONGEST = 44  # characters of a title
_HEAD = 44.0  # height of the legend


@dataclass
class _Cell:
    """A box, or where an edge passes a row (``box`` is ``None``)."""

    number: int
    row: int
    box: Box | None
    width: float = 8.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    above: list[_Cell] = field(default_factory=list)
    below: list[_Cell] = field(default_factory=list)


@dataclass
class _Drawing:
    view: View
    rows: list[list[_Cell]]
    heights: list[tuple[float, float]]  # top and bottom of each row
    cells: dict[int, _Cell]
    lines: list[tuple[_Cell, _Cell]]  # from one row to the next
    frames: list[tuple[Repeat, float, float, float, float]]


def _levels(view: View) -> dict[int, int]:
    """A row for every box: below all that it reads, and the rows of a frame are its own."""
    graph, level, base, current = view.graph, {}, 0, None
    for number in nx.lexicographical_topological_sort(graph):
        segment = sum(number >= edge for r in view.repeats for edge in (r.start, r.stop))
        if segment != current and level:
            base = max(level.values()) + 2  # a row between, for what enters a frame
        current = segment
        level[number] = max([base, *(level[k] + 1 for k in graph.predecessors(number))])
    for number in [k for k in graph if graph.in_degree(k) == 0 and graph.out_degree(k)]:
        if any(number in repeat for repeat in view.repeats):
            continue
        # An input stands right above its first reader, above the frame if that is in one.
        reader = min(graph.successors(number), key=lambda k: level[k])
        frame = [repeat for repeat in view.repeats if reader in repeat]
        top = min(level[k] for k in graph if k in frame[0]) if frame else level[reader]
        level[number] = max(level[number], top - 1)
    return level


def _layout(view: View) -> _Drawing:
    level = _levels(view)
    rows: list[list[_Cell]] = [[] for _ in range(max(level.values(), default=0) + 1)]
    cells: dict[int, _Cell] = {}
    for number in sorted(view.graph):
        box = view.graph.nodes[number]["box"]
        texts = [(_title(box), _CHARACTER), (box.subtitle, _SMALL)]
        width = max(len(text) * size for text, size in texts) + 26
        height = 44.0 if box.subtitle else 27.0
        cells[number] = _Cell(number, level[number], box, width, height)
        rows[level[number]].append(cells[number])
    lines: list[tuple[_Cell, _Cell]] = []
    for source in sorted(view.graph):
        # What several boxes read runs down in one line, from which each takes its own.
        trunk = [cells[source]]
        targets = sorted(view.graph.successors(source), key=lambda k: (level[k], k))
        for target in targets:
            while trunk[-1].row < level[target] - 1:
                trunk.append(_Cell(source, trunk[-1].row + 1, None))
                rows[trunk[-1].row].append(trunk[-1])
                lines.append((trunk[-2], trunk[-1]))
            lines.append((trunk[level[target] - 1 - level[source]], cells[target]))
    for upper, lower in lines:
        upper.below.append(lower)
        lower.above.append(upper)
    _order(rows)
    _place(rows)
    drawing = _Drawing(view, rows, [], cells, lines, [])
    _stack(drawing)
    return drawing


def _title(box: Box) -> str:
    shorten = printer.shorten_name if box.kind == SITE else printer.shorten_end
    return shorten(box.title, _LONGEST)


def _order(rows: list[list[_Cell]]) -> None:
    """Orders every row by the mean place of its neighbours, up and down in turn."""

    def settle(row: list[_Cell]) -> None:
        for place, cell in enumerate(row):
            cell.x = place - len(row) / 2

    for row in rows:
        settle(row)
    for _ in range(4):
        for row in rows:
            row.sort(key=lambda cell: _mean(cell.above, cell.x))
            settle(row)
        for row in reversed(rows):
            row.sort(key=lambda cell: _mean(cell.below, cell.x))
            settle(row)


def _mean(cells: Sequence[_Cell], otherwise: float) -> float:
    return sum(cell.x for cell in cells) / len(cells) if cells else otherwise


def _place(rows: list[list[_Cell]]) -> None:
    """Draws every cell to its neighbours, as far as the order of its row allows.

    Long edges are to be straight, and so is the way from box to box; an edge that skips rows may
    bend where it begins and ends.
    """

    def pull(cell: _Cell, other: _Cell) -> float:
        return (1.0, 0.25, 5.0)[(cell.box is None) + (other.box is None)]

    def wanted(cell: _Cell, around: Sequence[_Cell]) -> float:
        total = sum(pull(cell, other) for other in around)
        return sum(pull(cell, other) * other.x for other in around) / total if around else cell.x

    for cell in itertools.chain.from_iterable(rows):
        cell.x = 0.0
    for turn in range(120):
        for row in rows if turn % 2 == 0 else reversed(rows):
            _spread(row, [wanted(c, c.above if turn < 2 else c.above + c.below) for c in row])
        # Rows alone straighten a long drawing slowly: all that is below a row moves at once.
        shift = 0.0
        for row in rows:
            pulls = [(pull(c, other), other.x - c.x - shift) for c in row for other in c.above]
            if pulls:
                shift += sum(a * b for a, b in pulls) / sum(a for a, _ in pulls)
            for cell in row:
                cell.x += shift


def _spread(row: list[_Cell], wanted: Sequence[float]) -> None:
    """The places nearest to the wanted ones (least squares) that keep cells apart: isotonic
    regression by pooling adjacent violators."""
    shift, shifts = 0.0, []
    for left, right in itertools.pairwise([None, *row]):
        assert right is not None
        if left is not None:
            narrow = left.box is None or right.box is None
            shift += (left.width + right.width) / 2 + (_GAP_X / 2 if narrow else _GAP_X)
        shifts.append(shift)
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for cell, want, move in zip(row, wanted, shifts, strict=True):
        mean, weight, length = want - move, (1.0 if cell.box else 2.0), 1
        while pools and pools[-1][0] > mean:
            other, other_weight, other_length = pools.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, length = weight + other_weight, length + other_length
        pools.append((mean, weight, length))
    means = itertools.chain.from_iterable([mean] * length for mean, _, length in pools)
    for cell, mean, move in zip(row, means, shifts, strict=True):
        cell.x = mean + move


def _stack(drawing: _Drawing) -> None:
    """Heights of the rows, places of the frames."""
    spans = {
        repeat: sorted({cell.row for k, cell in drawing.cells.items() if k in repeat})
        for repeat in drawing.view.repeats
    }
    first, last = ({span[end] for span in spans.values()} for end in (0, -1))
    y = 0.0
    for number, row in enumerate(drawing.rows):
        if number in first:
            y += _FRAME_TITLE
        height = max((cell.height for cell in row), default=0.0)
        drawing.heights.append((y, y + height))
        for cell in row:
            cell.y = y + height / 2
        y += height + _GAP_Y + (_FRAME if number in last else 0.0)
    for repeat in drawing.view.repeats:
        inside = [cell for k, cell in drawing.cells.items() if k in repeat]
        first_row, last_row = spans[repeat][0], spans[repeat][-1]
        for cell in itertools.chain.from_iterable(drawing.rows[first_row : last_row + 1]):
            readers = drawing.view.graph.successors(cell.number)
            below = [k for k in readers if drawing.cells[k].row > cell.row]
            if cell.box is None and (cell.number in repeat or all(k in repeat for k in below)):
                inside.append(cell)
        left = min(cell.x - cell.width / 2 for cell in inside) - _FRAME
        right = max(cell.x + cell.width / 2 for cell in inside) + _FRAME
        right = max(right, left + len(drawing.view.titles[repeat]) * _CHARACTER + 2 * _FRAME)
        top = drawing.heights[first_row][0] - _FRAME_TITLE - 8
        bottom = drawing.heights[last_row][1] + _FRAME
        drawing.frames.append((repeat, left, top, right, bottom))


# --------------------------------------------------------------------------------------- SVG


def _svg(drawing: _Drawing) -> str:
    edges = [(c.x - c.width / 2, c.x + c.width / 2) for row in drawing.rows for c in row]
    edges += [(left, right) for _, left, _, right, _ in drawing.frames]
    legend = _legend(drawing)
    left = min((a for a, _ in edges), default=0.0)
    right = max([b for _, b in edges] + [left + sum(width for *_, width in legend)])
    bottom = max([b for _, b in drawing.heights] + [f[4] for f in drawing.frames], default=0.0)
    picture = environment()
    picture.filters["printable"] = lambda text: "".join(c for c in text if c.isprintable())
    text = picture.get_template("graph.svg.j2").render(
        x=left - _MARGIN,
        y=-_HEAD - _MARGIN,
        width=right - left + 2 * _MARGIN,
        height=bottom + _HEAD + 2 * _MARGIN,
        left=left,
        top=-_HEAD - 4,
        legend=legend,
        frames=[(drawing.view.titles[repeat], *place) for repeat, *place in drawing.frames],
        paths=[(_path(drawing, *line), line[1].box is not None) for line in drawing.lines],
        cells=drawing.cells.values(),
        title=_title,
        hint=_hint,
        colors=colors_of,
    )
    return text + "\n"


def _path(drawing: _Drawing, upper: _Cell, lower: _Cell) -> str:
    """One row's part of an edge: straight through the row, then a curve to the next."""
    y0 = upper.y + upper.height / 2 if upper.box else drawing.heights[upper.row][1]
    y1 = lower.y - lower.height / 2 if lower.box else drawing.heights[lower.row][0]
    path = f"M{upper.x:.1f} {upper.y:.1f} V{y0:.1f}"
    if abs(upper.x - lower.x) > 0.05:
        # The curve stays between the rows, however tall their tallest boxes are, and below the
        # title of a frame that begins there.
        bottom = min(y1, drawing.heights[lower.row][0])
        top = max(y0, drawing.heights[upper.row][1], bottom - _GAP_Y)
        middle = (top + bottom) / 2
        path += f" V{top:.1f} C{upper.x:.1f} {middle:.1f} {lower.x:.1f} {middle:.1f}"
        path += f" {lower.x:.1f} {bottom:.1f}"
    end = y1 if lower.box else lower.y
    if end != y0 and not path.endswith(f" {end:.1f}"):  # a part of no length would turn the tip
        path += f" V{end:.1f}"
    return path


def _hint(box: Box) -> str:
    """What a viewer shows when the mouse rests on a box: all copies with their own ranks."""
    if box.kind != SITE:
        return ", ".join(box.operations) or box.name
    return "; ".join(
        f"{name}: {printer.format_text(box.format, ranks, box.precision)}"
        for name, ranks in zip(box.names, box.ranks, strict=True)
    )


def _legend(drawing: _Drawing) -> list[tuple[str, str, float, float]]:
    """Format, text, place and width of every entry."""
    boxes = [cell.box for cell in drawing.cells.values() if cell.box is not None]
    texts = [
        (form.name, f"{printer.format_text(form.name)}: {printer.plural(len(names), 'site')}")
        for form in formats()
        if (names := {name for box in boxes if box.format == form.name for name in box.names})
    ]
    texts.append((OTHER, "other operations"))
    widths = [25 + len(text) * _CHARACTER + 22 for _, text in texts]
    places = itertools.accumulate(widths, initial=0.0)
    return [(*text, x, width) for text, x, width in zip(texts, places, widths, strict=False)]
