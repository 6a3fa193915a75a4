"""A graph as a picture, drawn in steps, each a plain function.

``collapse`` makes boxes of nodes (a site with its cores is one box, views vanish), ``fold`` finds
blocks that follow each other with the same structure and keeps one copy of each, ``chained`` joins
the other operations, ``_layout`` gives every box a row and a place (a layered drawing: Sugiyama,
Tagawa, Toda 1981), and ``_svg`` writes it down.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import fx

from tensorize.base import printer
from tensorize.formats.dense import is_dense
from tensorize.graphview.text import parameter_name, target_text

INPUT, OUTPUT, SITE, OTHER = "input", "output", "site", "other"

# Operations that only move, name or copy numbers: no box of their own.
_PLUMBING = frozenset(
    """
    alias chunk clone contiguous detach dropout expand flatten getitem lift_fresh_copy permute
    repeat reshape select size slice split split_with_sizes squeeze t to transpose type_as unbind
    unflatten unsafe_split unsqueeze view _to_copy _unsafe_view
    """.split()  # noqa: SIM905
)


@dataclass
class Box:
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
    precision: str | None = None

    def absorb(self, other: Box) -> None:
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
        return (self.kind, named, self.format, self.precision, self.shape, operations, owners)

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
        arrow = "" if is_dense(self.format) and self.precision is None else "→ "
        parts = (printer.shape_text(self.shape), arrow + what, ranks, self.precision)
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


def shapes_of(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Qualified name → shape of every parameter that a graph reads."""
    shapes: dict[str, tuple[str, ...]] = {}
    for node in gm.graph.nodes:
        name = parameter_name(gm, node)
        value = node.meta.get("val")
        if name is not None and hasattr(value, "shape"):
            shapes[name] = tuple(str(size) for size in value.shape)
    return shapes


def collapse(gm: fx.GraphModule, shapes: Mapping[str, tuple[str, ...]]) -> nx.DiGraph:
    """A graph of ``Box`` by number: an acyclic one, numbers in topological order."""
    sites: Mapping[str, tuple[str, str, Sequence[int], str | None]] = gm.meta.get("tensorize_sites", {})
    shapes = {**shapes_of(gm), **shapes}
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
    site: tuple[Any, ...] | None,
    shapes: Mapping[str, tuple[str, ...]],
) -> Box:
    if node.op == "placeholder":
        return Box(INPUT, position, node.name)
    if node.op == "output":
        return Box(OUTPUT, position, "output")
    if site is None:
        return Box(OTHER, position, operations=[operation])
    name, format, ranks, *precision = site
    return Box(
        SITE,
        position,
        name,
        format,
        shapes.get(name, ()),
        [tuple(ranks)],
        [name],
        [operation],
        precision=precision[0] if precision else None,
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
    boxes: dict[int, Box] = {k: graph.nodes[k]["box"] for k in graph}
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
class Repeat:
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
class View:
    """What is drawn: boxes and edges without the folded copies, and the frames around blocks."""

    graph: nx.DiGraph
    repeats: list[Repeat]
    titles: dict[Repeat, str]


def _repeats(graph: nx.DiGraph, low: int, high: int) -> Iterator[Repeat]:
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

    best, slack = Repeat(low, 1, 1), 0
    for period in range(1, (high - low) // 2 + 1):
        start = low
        while start + 2 * period <= high:
            if signatures[start] != signatures[start + period]:
                start += 1
                continue
            stop = start
            while stop + period < high and follows(stop, period, start):
                stop += 1
            found = Repeat(start, period, (stop - start) // period + 1)
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
                graph, found := Repeat(best.start + shift, best.period, best.count - fewer)
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


def _handed_on(graph: nx.DiGraph, repeat: Repeat) -> int:
    """How many results of the first copy are read after it."""
    stop = repeat.start + repeat.period
    return sum(any(k >= stop for k in graph.successors(n)) for n in range(repeat.start, stop))


def _prefixes(graph: nx.DiGraph, repeat: Repeat) -> list[str]:
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


def fold(graph: nx.DiGraph) -> View:
    """Draws every repeat once: copies are laid on the first one, edges between copies left out."""
    repeats = list(_repeats(graph, 0, len(graph)))

    def place(number: int) -> tuple[int, int]:
        for repeat in repeats:
            if number in repeat:
                copy, offset = divmod(number - repeat.start, repeat.period)
                return repeat.start + offset, copy
        return number, 0

    titles: dict[Repeat, str] = {}
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
    return View(folded, repeats, titles)


def chained(view: View) -> View:
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
