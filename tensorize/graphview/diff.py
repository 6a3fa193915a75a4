"""What differs between two graphs, as text."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from tensorize.base.printer import format_text, plural
from tensorize.graphview.text import GraphText, inner_graphs, is_check, leaves_of, parameter_name


@dataclass
class _Side:
    """One of two graphs: its calls, and what makes two of them the same operation."""

    gm: fx.GraphModule
    text: GraphText = field(init=False)
    nodes: list[fx.Node] = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.text = GraphText(self.gm)
        for node in self.gm.graph.nodes:  # symbols by appearance, parameters' included
            self.text.type(node)
        self.nodes = [
            node
            for node in self.gm.graph.nodes
            if not (is_check(node) or parameter_name(self.gm, node) is not None)
        ]
        self.keys = [self.key(node) for node in self.nodes]

    def key(self, node: fx.Node) -> str:
        """A node's line with no names in it but those of parameters, which do not depend on how
        many nodes come before."""

        def nameless(other: fx.Node) -> str:
            return parameter_name(self.gm, other) or f"%{self.text.type(other)}"

        if node.op == "placeholder":
            return f"input {self.text.type(node)}"
        if node.op == "output":
            return f"return {len(list(leaves_of(node.args)))}"
        return f"{self.text.type(node)} = {self.text.call(node, nameless)}"

    def parameters(self, start: int, stop: int) -> dict[str, str]:
        """Qualified name → type of the parameters that a stretch of nodes reads."""
        read = (n for node in self.nodes[start:stop] for n in node.all_input_nodes)
        found = {parameter_name(self.gm, node): self.text.type(node) for node in read}
        return {name: text for name, text in found.items() if name is not None}

    def leaving(self, start: int, stop: int) -> list[fx.Node]:
        """The nodes of a stretch that are used outside of it."""
        inside = set(self.nodes[start:stop])
        return [node for node in self.nodes[start:stop] if set(node.users) - inside]


_Block = tuple[bool, int, int, int, int]
"""Whether a stretch is the same on both sides, and its ends before and after."""


def _anchors(a: list[str], b: list[str]) -> list[tuple[int, int]]:
    """Pairs of lines that occur exactly once on both sides, in order.

    Layers of a model look alike, so matching the longest stretch first can pair one layer with
    another; a norm with its own parameters can not be mistaken (the idea of patience diff).
    """
    once = {key for key, count in Counter(a).items() if count == 1 and b.count(key) == 1}
    in_a, in_b = ([k for k, key in enumerate(side) if key in once] for side in (a, b))
    matcher = difflib.SequenceMatcher(None, [a[k] for k in in_a], [b[k] for k in in_b], False)
    blocks = matcher.get_matching_blocks()
    return [(in_a[i + k], in_b[j + k]) for i, j, size in blocks for k in range(size)]


def _blocks(a: list[str], b: list[str]) -> Iterator[_Block]:
    """Stretches of equal and of different lines, in order."""
    start_a = start_b = 0
    for end_a, end_b in [*_anchors(a, b), (len(a), len(b))]:
        matcher = difflib.SequenceMatcher(None, a[start_a:end_a], b[start_b:end_b], autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            yield tag == "equal", start_a + i1, start_a + i2, start_b + j1, start_b + j2
        if end_a < len(a) and end_b < len(b):
            yield True, end_a, end_a + 1, end_b, end_b + 1
        start_a, start_b = end_a + 1, end_b + 1


def _merged(blocks: Iterable[_Block]) -> list[_Block]:
    """Neighbours of the same sort made one."""
    merged: list[_Block] = []
    for same, i1, i2, j1, j2 in blocks:
        if merged and merged[-1][0] == same:
            _, start_a, _, start_b, _ = merged.pop()
            i1, j1 = start_a, start_b
        merged.append((same, i1, i2, j1, j2))
    return merged


def _rewired(before: _Side, after: _Side, blocks: Sequence[_Block]) -> list[_Block]:
    """``blocks`` with every node taken out that looks the same but reads other results."""
    partner: dict[fx.Node, fx.Node] = {}
    for same, i1, i2, j1, j2 in blocks:
        old, new = before.nodes[i1:i2], after.nodes[j1:j2]
        if not same:  # what a rewritten stretch hands on takes the place of what it handed on
            old, new = before.leaving(i1, i2), after.leaving(j1, j2)
            if [before.text.type(n) for n in old] != [after.text.type(n) for n in new]:
                continue
        partner.update(zip(old, new, strict=True))

    def reads_same(old: fx.Node, new: fx.Node) -> bool:
        inputs = [
            [n for n in node.all_input_nodes if parameter_name(side.gm, n) is None]
            for side, node in ((before, old), (after, new))
        ]
        return [partner.get(node) for node in inputs[0]] == inputs[1]

    result: list[_Block] = []
    for same, i1, i2, j1, j2 in blocks:
        if not same:
            result.append((same, i1, i2, j1, j2))
            continue
        for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
            same_reads = reads_same(before.nodes[i], after.nodes[j])
            result.append((same_reads, i, i + 1, j, j + 1))
    return _merged(result)


def _hunk(before: _Side, after: _Side, block: _Block) -> Iterator[str]:
    """A rewritten stretch under what it does to the parameters: names, shapes, format, ranks."""
    _, i1, i2, j1, j2 = block
    old, new = before.parameters(i1, i2), after.parameters(j1, j2)
    gone = [f"{name} {text}" for name, text in old.items() if name not in new]
    come = [f"{name} {text}" for name, text in new.items() if name not in old]
    owners = [text.split(" ")[0].split(".")[:-1] for text in (*gone, *come)]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    lead = "".join(f"{parts[0]}." for parts in same)
    before_text, after_text = (
        ", ".join(text.removeprefix(lead) for text in side) for side in (gone, come)
    )
    sites = [
        after.text.sites[node.name] for node in after.nodes[j1:j2] if node.name in after.text.sites
    ]
    formats = ", ".join(dict.fromkeys(format_text(*site[1:]) for site in sites))
    right = ": ".join(part for part in (formats, after_text) if part)
    if gone or right:
        heading = (
            f"@@ {lead and lead[:-1] + ': '}{before_text or 'nothing'} -> {right or 'nothing'}"
        )
        yield heading if len(heading) <= 100 else heading.replace(" -> ", "\n   -> ")
    else:
        yield "@@"
    several = len({site[0] for site in sites}) > 1
    yield from (f"- {before.text.line(node, site=False)}" for node in before.nodes[i1:i2])
    yield from (f"+ {after.text.line(node, site=several)}" for node in after.nodes[j1:j2])


def diff_graphs(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """What a rewrite changed: ``-`` lines of ``before``, ``+`` lines of ``after``.

    Operations are matched by what they compute and which parameters they read, not by the names of
    nodes, so a node that is only numbered otherwise is no difference; one that reads another result
    is. Unchanged stretches are folded. Parameters have no lines of their own: the heading of a
    rewritten stretch (``@@``) says which went and which came, with shapes, format and ranks. Graphs
    inside (of higher-order operators) follow where they differ.
    """
    old, new = _Side(before), _Side(after)
    blocks = _rewired(old, new, _merged(_blocks(old.keys, new.keys)))
    lines = list(_changes(old, new, blocks))
    for path, inner in inner_graphs(before).items():
        other = inner_graphs(after).get(path)
        text = "" if other is None else diff_graphs(inner, other)
        if text and not text.startswith(_SAME):
            lines.append(f"graph {path}: {text.rstrip()}")
    return "\n".join(lines or [f"{_SAME}: {plural(len(old.nodes), 'node')} unchanged"]) + "\n"


_SAME = "no differences"


def _changes(old: _Side, new: _Side, blocks: Sequence[_Block]) -> Iterator[str]:
    """The lines of a difference, none where there is none."""
    changed = sum(not same for same, *_ in blocks)
    if not changed:
        return
    sizes = " -> ".join(plural(len(side.nodes), "node") for side in (old, new))
    yield f"{sizes}, changed in {plural(changed, 'place')}"
    for block in blocks:
        same, _, _, start, stop = block
        if not same:
            yield from _hunk(old, new, block)
        elif stop - start > 1:
            yield f"  ... {plural(stop - start, 'node')} unchanged"
        else:
            yield f"  {new.text.line(new.nodes[start], site=False)}"
