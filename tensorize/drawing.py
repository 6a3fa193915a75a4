"""A graph as a picture, drawn in steps, each a plain function.

``_collapse`` makes boxes of nodes (a site with its cores is one box, views vanish), ``_fold`` finds
blocks that follow each other with the same structure and keeps one copy of each, ``_chained`` joins
the other operations, ``_layout`` gives every box a row and a place (a layered drawing: Sugiyama,
Tagawa, Toda 1981), and ``_svg`` writes it down.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from tensorize import printer
from tensorize.graph_text import parameter_name, target_text
from tensorize.ir import DENSE

INPUT, OUTPUT, SITE, OTHER = "input", "output", "site", "other"

# Operations that only move, name or copy numbers: no box of their own.
_PLUMBING = frozenset(
    """
    alias chunk clone contiguous detach dropout expand flatten getitem lift_fresh_copy permute
    repeat reshape select size slice split split_with_sizes squeeze t to transpose type_as unbind
    unflatten unsafe_split unsqueeze view _to_copy _unsafe_view
    """.split()  # noqa: SIM905
)


def draw(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """The graph after a rewrite as one self-contained SVG picture; ``before`` knows dense shapes.

    What it reads in ``gm.meta`` is said in ``graphs.Graphs``.
    """
    boxes = _collapse(after, _shapes(before))
    return _svg(_layout(_chained(_fold(boxes))))


# ----------------------------------------------------------------------------- nodes → boxes


@dataclass
class _Box:
    """What is drawn as one box: nodes of one site, a chain of other operations, or an end."""

    kind: str
    first: int  # position of its first node in the graph
    name: str = ""
    format: str = OTHER
    shape: tuple[str, ...] = ()
    ranks: list[tuple[int, ...]] = field(default_factory=list)  # one entry a copy
    names: list[str] = field(default_factory=list)  # one entry a copy
    operations: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def absorb(self, other: _Box) -> None:
        ours, theirs = (self, other) if self.first < other.first else (other, self)
        self.operations = ours.operations + theirs.operations
        self.parameters = ours.parameters + theirs.parameters
        self.first = ours.first

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for boxes that may be drawn as copies of each other; ranks may differ."""

        def anonymous(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(re.sub(r"\d+", "#", name) for name in names)

        owners = anonymous(self.parameters) if self.kind == OTHER else ()
        operations = tuple(self.operations) if self.kind == OTHER else ()
        named = anonymous([self.name]) if self.kind == SITE else (self.name,)
        return (self.kind, named, self.format, self.shape, operations, owners)

    @property
    def title(self) -> str:
        if self.kind == OTHER:
            return self.name or _listed(self.operations)
        return self.name.removesuffix(".weight") if self.kind == SITE else self.name

    @property
    def subtitle(self) -> str:
        """A site's shape and what it became: ``"768×768 → low rank 32–64"``."""
        if self.kind != SITE:
            return ""
        what = printer.format_text(self.format)
        ranks = "·".join(
            f"{min(rank)}–{max(rank)}" if len(set(rank)) > 1 else str(rank[0])
            for rank in zip(*self.ranks, strict=False)
        )
        arrow = "" if self.format == DENSE else "→ "
        parts = (printer.shape_text(self.shape), arrow + what, ranks)
        return " ".join(part for part in parts if part)


def _listed(operations: Sequence[str]) -> str:
    """The operations of a box: all of a few, of many the one with the longest name, which is most
    often the one with the most in it."""
    text = re.sub(r"\bpow mean add rsqrt( mul){1,2}\b", "rms_norm", " ".join(operations))
    operations = text.split()
    runs = [(name, len(list(run))) for name, run in itertools.groupby(operations)]
    if len(runs) > 4:
        return f"{max(operations, key=len)} + {len(operations) - 1} operations"
    return " · ".join(name if count == 1 else f"{name} ×{count}" for name, count in runs)


def _shapes(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Qualified name → shape of every parameter that a graph reads."""
    shapes: dict[str, tuple[str, ...]] = {}
    for node in gm.graph.nodes:
        name = parameter_name(gm, node)
        value = node.meta.get("val")
        if name is not None and hasattr(value, "shape"):
            shapes[name] = tuple(str(size) for size in value.shape)
    return shapes


def _collapse(gm: fx.GraphModule, shapes: Mapping[str, tuple[str, ...]]) -> nx.DiGraph:
    """A graph of ``_Box`` by number: an acyclic one, numbers in topological order."""
    sites: Mapping[str, tuple[str, str, Sequence[int]]] = gm.meta.get("tensorize_sites", {})
    shapes = {**_shapes(gm), **shapes}
    graph = nx.DiGraph()
    owner: dict[fx.Node, int] = {}
    reads: dict[fx.Node, list[str]] = {}  # nodes that are parameters, or views of such
    for position, node in enumerate(gm.graph.nodes):
        operation = target_text(node).removeprefix("aten.").removeprefix(".")
        unused = not node.users and node.op != "output"
        name = parameter_name(gm, node)
        if name is not None:
            reads[node] = [name]
        if name is not None or (unused and node.op != "placeholder"):
            continue
        inputs = list(dict.fromkeys(owner[n] for n in node.all_input_nodes if n in owner))
        parameters = [name for n in node.all_input_nodes for name in reads.get(n, ())]
        if operation in _PLUMBING and parameters and not inputs:
            reads[node] = parameters
            continue
        site = sites.get(node.name)
        home: int | None = None
        if site is not None:
            same = [k for k in inputs if graph.nodes[k]["box"].name == site[0]]
            home = same[0] if same else None
            # Joined, a way that leaves the box and comes back would become a circle.
            if home is not None and any(nx.has_path(graph, home, k) for k in inputs if k != home):
                home = None
        elif operation in _PLUMBING and len(inputs) == 1:
            home = inputs[0]
        box = _box(node, position, operation, site, shapes)
        box.parameters = parameters
        if home is None:
            home = position
            graph.add_node(home, box=box)
        elif site is not None or operation not in _PLUMBING:
            graph.nodes[home]["box"].absorb(box)
        owner[node] = home
        graph.add_edges_from((k, home) for k in inputs if k != home)
    return _numbered(_prepared(graph))


def _box(
    node: fx.Node,
    position: int,
    operation: str,
    site: tuple[str, str, Sequence[int]] | None,
    shapes: Mapping[str, tuple[str, ...]],
) -> _Box:
    if node.op == "placeholder":
        return _Box(INPUT, position, node.name)
    if node.op == "output":
        return _Box(OUTPUT, position, "output")
    if site is None:
        return _Box(OTHER, position, operations=[operation])
    name, format, ranks = site
    return _Box(
        SITE,
        position,
        name,
        format,
        shapes.get(name, ()),
        [tuple(ranks)],
        [name],
        [operation],
    )


def _merge(graph: nx.DiGraph, keep: int, gone: int) -> None:
    """Puts one box into another, with its edges."""
    graph.nodes[keep]["box"].absorb(graph.nodes[gone]["box"])
    graph.add_edges_from((source, keep) for source in graph.predecessors(gone) if source != keep)
    graph.add_edges_from((keep, target) for target in graph.successors(gone) if target != keep)
    graph.remove_node(gone)


def _prepared(graph: nx.DiGraph) -> nx.DiGraph:
    """Everything that happens before any site (masks, positions) as one box.

    No path can leave these boxes and come back: what they read is among them, or is an input.
    """
    boxes: dict[int, _Box] = {k: graph.nodes[k]["box"] for k in graph}
    sites = [k for k, box in boxes.items() if box.kind == SITE]
    later = set(sites).union(*(nx.descendants(graph, k) for k in sites))
    early = [k for k, box in boxes.items() if box.kind == OTHER and k not in later]
    if not sites or not early:
        return graph
    for k in early[1:]:
        _merge(graph, early[0], k)
    box = boxes[early[0]]
    if len(box.operations) > 4:
        box.name = f"preparation: {len(box.operations)} operations"
    return graph


def _numbered(graph: nx.DiGraph) -> nx.DiGraph:
    order = nx.lexicographical_topological_sort(graph)
    return nx.relabel_nodes(graph, {k: number for number, k in enumerate(order)})


# ----------------------------------------------------------------------------------- folding


@dataclass(frozen=True)
class _Repeat:
    """``count`` copies of ``period`` boxes each, the first copy at ``start``."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count

    @property
    def saved(self) -> int:
        """How many boxes need not be drawn."""
        return self.period * (self.count - 1)

    def __contains__(self, number: int) -> bool:
        return self.start <= number < self.stop


@dataclass
class _View:
    """What is drawn: boxes and edges without the folded copies, and the frames around blocks."""

    graph: nx.DiGraph
    repeats: list[_Repeat]
    titles: dict[_Repeat, str]


def _repeats(graph: nx.DiGraph, low: int, high: int) -> Iterator[_Repeat]:
    """The repeats among the boxes from ``low`` to ``high``: the one that saves most, then those
    before and after it."""
    kinds: dict[tuple[object, ...], int] = {}
    signatures = {
        k: kinds.setdefault(graph.nodes[k]["box"].signature, len(kinds)) for k in range(low, high)
    }
    inputs = {k: set(graph.predecessors(k)) for k in range(low, high)}

    def follows(number: int, period: int, start: int) -> bool:
        """Whether the box one period later is the same with the same inputs, one period later."""
        if signatures[number] != signatures[number + period]:
            return False
        ours, theirs = inputs[number], inputs[number + period]
        moved = {k + period for k in ours}  # the same inputs of the next copy
        shared = {k for k in ours & theirs if k < start}  # what all copies read, such as a mask
        enters = {k for k in ours - shared if k + period not in theirs}
        passed = theirs - moved - shared  # what the first copy hands on in the place of those
        return (
            len(enters) == len(passed)
            and all(k < start for k in enters)
            and all(start <= k < start + period for k in passed)
        )

    best, slack = _Repeat(low, 1, 1), 0
    for period in range(1, (high - low) // 2 + 1):
        start = low
        while start + 2 * period <= high:
            if signatures[start] != signatures[start + period]:
                start += 1
                continue
            stop = start
            while stop + period < high and follows(stop, period, start):
                stop += 1
            found = _Repeat(start, period, (stop - start) // period + 1)
            if found.saved > best.saved:
                best, slack = found, (stop - start) % period
            start = stop if stop - start >= period else start + 1
    if best.saved < 4:  # a frame around so little is no gain
        return
    # A run of equal boxes does not say where a block begins. The names of the sites do, and that a
    # whole block hands on little more than one value.
    for fewer in range(best.count - 1):
        fitting = [
            found
            for shift in range(slack + 1 + fewer * best.period)
            if _prefixes(
                graph, found := _Repeat(best.start + shift, best.period, best.count - fewer)
            )
            and all(
                follows(k, found.period, found.start)
                for k in range(found.start, found.stop - found.period)
            )
        ]
        if fitting:
            best = min(fitting, key=lambda found: (_handed_on(graph, found), found.start))
            break
    yield from _repeats(graph, low, best.start)
    yield best
    yield from _repeats(graph, best.stop, high)


def _handed_on(graph: nx.DiGraph, repeat: _Repeat) -> int:
    """How many results of the first copy are read after it."""
    stop = repeat.start + repeat.period
    return sum(any(k >= stop for k in graph.successors(n)) for n in range(repeat.start, stop))


def _prefixes(graph: nx.DiGraph, repeat: _Repeat) -> list[str]:
    """``["encoder.layer.0", "encoder.layer.1", …]``, what the names of a copy's sites begin with
    and those of other copies do not; empty where there is nothing like it."""
    prefixes: list[set[str]] = [set() for _ in range(repeat.count)]
    for k in range(repeat.start, repeat.start + repeat.period):
        copies = [graph.nodes[n]["box"] for n in range(k, repeat.stop, repeat.period)]
        names = [[box.name] if box.kind == SITE else box.parameters for box in copies]
        for same in zip(*names, strict=True):
            parts = [name.split(".") for name in same]
            columns = enumerate(zip(*parts, strict=False))
            differ = next((i for i, column in columns if len(set(column)) > 1), None)
            if differ is None:  # all copies share it
                continue
            for found, part in zip(prefixes, parts, strict=True):
                found.add(".".join(part[: differ + 1]))
    if any(len(found) != 1 for found in prefixes):
        return []
    return [found.pop() for found in prefixes]


def _fold(graph: nx.DiGraph) -> _View:
    """Draws every repeat once: copies are laid on the first one, edges between copies left out."""
    repeats = list(_repeats(graph, 0, len(graph)))

    def place(number: int) -> tuple[int, int]:
        for repeat in repeats:
            if number in repeat:
                copy, offset = divmod(number - repeat.start, repeat.period)
                return repeat.start + offset, copy
        return number, 0

    titles: dict[_Repeat, str] = {}
    for repeat in repeats:
        prefixes = _prefixes(graph, repeat)
        titles[repeat] = f"× {repeat.count}"
        if prefixes:
            titles[repeat] += f" · {prefixes[0]} … {prefixes[-1].rpartition('.')[2]}"
            for number in range(repeat.start, repeat.start + repeat.period):
                box = graph.nodes[number]["box"]
                box.name = box.name.removeprefix(prefixes[0] + ".")
    folded = nx.DiGraph()
    for number in sorted(graph):
        box = graph.nodes[number]["box"]
        first, copy = place(number)
        if copy:
            folded.nodes[first]["box"].ranks += box.ranks
            folded.nodes[first]["box"].names += box.names
        else:
            folded.add_node(number, box=box)
    for source, target in graph.edges:
        (a, copy_a), (b, copy_b) = place(source), place(target)
        inside = any(source in repeat and target in repeat for repeat in repeats)
        if not (inside and copy_a != copy_b):
            folded.add_edge(a, b)
    return _View(folded, repeats, titles)


def _chained(view: _View) -> _View:
    """Other operations that are read by one other box only become a part of that.

    Every path from such a box leads through its reader, so no circle can come of it. What is
    inside a frame stays inside.
    """
    graph = view.graph
    for k in sorted(graph, reverse=True):
        box = graph.nodes[k]["box"]
        if box.kind != OTHER or box.name or graph.out_degree(k) != 1:
            continue
        (reader,) = graph.successors(k)
        inside = [(k in repeat) == (reader in repeat) for repeat in view.repeats]
        if graph.nodes[reader]["box"].kind == OTHER and all(inside):
            _merge(graph, reader, k)
    return view


# ------------------------------------------------------------------------------------ layout

_CHARACTER, _SMALL = 7.3, 6.7  # widths of a title's and a subtitle's character
_GAP_X, _GAP_Y, _MARGIN = 26.0, 30.0, 28.0
_FRAME, _FRAME_TITLE = 16.0, 26.0
_LONGEST = 44  # characters of a title


@dataclass
class _Cell:
    """A box, or where an edge passes a row (``box`` is ``None``)."""

    number: int
    row: int
    box: _Box | None
    width: float = 8.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    above: list[_Cell] = field(default_factory=list)
    below: list[_Cell] = field(default_factory=list)


@dataclass
class _Drawing:
    view: _View
    rows: list[list[_Cell]]
    heights: list[tuple[float, float]]  # top and bottom of each row
    cells: dict[int, _Cell]
    lines: list[tuple[_Cell, _Cell]]  # from one row to the next
    frames: list[tuple[_Repeat, float, float, float, float]]


def _levels(view: _View) -> dict[int, int]:
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


def _layout(view: _View) -> _Drawing:
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


def _title(box: _Box) -> str:
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


def _escape(text: str) -> str:
    return html.escape("".join(c for c in text if c.isprintable()))


def _svg(drawing: _Drawing) -> str:
    boxes = [cell for cell in drawing.cells.values() if cell.box is not None]
    edges = [(c.x - c.width / 2, c.x + c.width / 2) for row in drawing.rows for c in row]
    edges += [(left, right) for _, left, _, right, _ in drawing.frames]
    legend, legend_width = _legend(drawing)
    left = min((a for a, _ in edges), default=0.0)
    right = max([b for _, b in edges] + [left + legend_width])
    bottom = max([b for _, b in drawing.heights] + [f[4] for f in drawing.frames], default=0.0)
    head = 44.0
    x, y = left - _MARGIN, -head - _MARGIN
    width, height = right - left + 2 * _MARGIN, bottom + head + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{x:.1f} {y:.1f} {width:.1f} {height:.1f}" role="img" '
        "font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', "
        'monospace" font-size="12">',
        "<title>The model's graph after tensorize</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0.8 L7.5 4 L0 7.2 z" fill="#8b94a5"/>'
        "</marker></defs>",
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
        f'<g transform="translate({left:.1f} {-head - 4:.1f})">{legend}</g>',
    ]
    for _, x0, y0, x1, y1 in drawing.frames:
        lines.append(
            f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" rx="12" '
            'fill="#fafbfc" stroke="#c6ccd6" stroke-dasharray="5 4"/>'
        )
    lines += [_edge(drawing, upper, lower) for upper, lower in drawing.lines]
    for repeat, x0, y0, _, _ in drawing.frames:
        lines.append(
            f'<text x="{x0 + 14:.1f}" y="{y0 + 20:.1f}" font-weight="600" fill="#3c4657" '
            'stroke="#fafbfc" stroke-width="5" paint-order="stroke">'
            f"{_escape(drawing.view.titles[repeat])}</text>"
        )
    lines += [_box_svg(cell) for cell in boxes]
    return "\n".join([*lines, "</svg>", ""])


def _edge(drawing: _Drawing, upper: _Cell, lower: _Cell) -> str:
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
    tip = ' marker-end="url(#tip)"' if lower.box else ""
    return f'<path d="{path}" fill="none" stroke="#8b94a5"{tip}/>'


def _box_svg(cell: _Cell) -> str:
    box = cell.box
    assert box is not None
    stroke, fill = printer.FORMAT_COLORS.get(box.format, printer.FORMAT_COLORS[OTHER])
    x, y = cell.x - cell.width / 2, cell.y - cell.height / 2
    round_ = cell.height / 2 if box.kind in (INPUT, OUTPUT) else 7
    ink = "#1a1f2b" if box.kind == SITE else "#4a5364"
    lines = [
        f"<g><title>{_escape(_hint(box))}</title>",
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell.width:.1f}" height="{cell.height:.1f}" '
        f'rx="{round_:.1f}" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="{1.4 if box.kind == SITE else 1}"/>',
        f'<text x="{cell.x:.1f}" y="{cell.y + (-4 if box.subtitle else 4):.1f}" '
        f'text-anchor="middle" fill="{ink}">{_escape(_title(box))}</text>',
    ]
    if box.subtitle:
        lines.append(
            f'<text x="{cell.x:.1f}" y="{cell.y + 13:.1f}" text-anchor="middle" font-size="11" '
            f'fill="{stroke}">{_escape(box.subtitle)}</text>'
        )
    return "".join([*lines, "</g>"])


def _hint(box: _Box) -> str:
    """What a viewer shows when the mouse rests on a box: all copies with their own ranks."""
    if box.kind != SITE:
        return ", ".join(box.operations) or box.name
    return "; ".join(
        f"{name}: {printer.format_text(box.format, ranks)}"
        for name, ranks in zip(box.names, box.ranks, strict=True)
    )


def _legend(drawing: _Drawing) -> tuple[str, float]:
    """The legend as SVG, and its width."""
    names = {
        format: {
            name
            for c in drawing.cells.values()
            if c.box is not None and c.box.format == format
            for name in c.box.names
        }
        for format in printer.FORMAT_LABELS
    }
    entries = [
        (format, f"{printer.FORMAT_LABELS[format]}: {printer.plural(len(found), 'site')}")
        for format, found in names.items()
        if found
    ]
    parts: list[str] = []
    x = 0.0
    for format, text in [*entries, (OTHER, "other operations")]:
        stroke, fill = printer.FORMAT_COLORS[format]
        parts.append(
            f'<rect x="{x:.1f}" y="0" width="18" height="13" rx="3" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.4"/><text x="{x + 25:.1f}" y="11" '
            f'fill="#3c4657">{_escape(text)}</text>'
        )
        x += 25 + len(text) * _CHARACTER + 22
    return "".join(parts), x
