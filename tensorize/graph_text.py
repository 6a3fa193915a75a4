"""FX graphs and their differences as plain text.

The text of a graph is ours, so that golden files survive a new torch: no addresses, no versions,
no overload names, symbols of dynamic shapes numbered by appearance, defaults left out.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from tensorize.printer import format_text, plural


def dtype_text(dtype: torch.dtype) -> str:
    """The short name of a dtype: ``"f32"``, ``"bf16"``, ``"i64"``, ``"f8_e4m3fn"``, ``"c64"``."""
    text = str(dtype).removeprefix("torch.")
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        text = re.sub(rf"^(b?){long}(?=\d)", rf"\g<1>{short}", text)
    return text


_LAST = 2**63 - 1  # what aten.slice means by "to the end"


class _Symbols:
    """Sizes of dynamic shapes under names that do not depend on torch: s0, s1, … by appearance."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}

    def text(self, size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> str:
        if isinstance(size, (bool, int)):
            return str(size)
        expr = sympy.sympify(size.node.expr)
        for symbol in sorted(expr.free_symbols, key=str):
            if isinstance(symbol, sympy.Symbol) and symbol not in self.names:
                self.names[symbol] = sympy.Symbol(f"s{len(self.names)}", integer=True)
        return str(expr.xreplace(self.names))


def _value_of(node: fx.Node) -> Any:
    """What is known of a node's result: a (fake) tensor, its metadata, a number, or ``None``."""
    for key in ("val", "example_value", "tensor_meta"):
        if node.meta.get(key) is not None:
            return node.meta[key]
    return None


def _type_text(value: Any, symbols: _Symbols) -> str:
    """``f32[2, 16]`` for a tensor or its metadata, a tuple of such for several, "" for unknown."""
    if isinstance(getattr(value, "dtype", None), torch.dtype) and hasattr(value, "shape"):
        sizes = ", ".join(symbols.text(size) for size in value.shape)
        return f"{dtype_text(value.dtype)}[{sizes}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return symbols.text(value)
    if isinstance(value, (bool, int, float)):
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type_text(v, symbols) or '–' for v in value)})"
    return ""


def target_text(node: fx.Node) -> str:
    """Short name of what a node calls: ``aten.linear``, ``getitem``, ``.view``, ``module fc1``."""
    target = node.target
    if node.op == "call_module":
        return f"module {target}"
    if node.op == "call_method":
        return f".{target}"
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).replace("::", ".")
    name = getattr(target, "__name__", None) or getattr(target, "_name", None)
    return str(name or type(target).__name__)


def parameter_name(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The qualified name of the parameter, buffer or submodule that a node reads, if it reads one.

    A ``get_attr`` node reads its target; a placeholder does where ``gm.meta["tensorize_names"]``
    (placeholder name → qualified name) has it, as with the lifted parameters of torch.export.
    """
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "placeholder":
        return gm.meta.get("tensorize_names", {}).get(node.name)
    return None


def _is_check(node: fx.Node) -> bool:
    """Whether a node only checks the inputs; where torch puts such nodes differs by version."""
    return node.op == "call_module" and node.target == "_guards_fn" and not node.users


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


class _GraphText:
    """The lines of one graph."""

    def __init__(self, gm: fx.GraphModule, symbols: _Symbols | None = None) -> None:
        self.gm, self.symbols = gm, symbols or _Symbols()
        self.sites: Mapping[str, tuple[str, str, Sequence[int]]]
        self.sites = gm.meta.get("tensorize_sites", {})

    def name(self, node: fx.Node) -> str:
        return parameter_name(self.gm, node) or node.name

    def type(self, node: fx.Node) -> str:
        value = _value_of(node)
        if value is None and node.op == "get_attr":
            value = _attribute(self.gm, str(node.target))
        return _type_text(value, self.symbols)

    def value(self, value: Any, name: Callable[[fx.Node], str]) -> str:
        """An argument, without anything that differs between runs or versions."""

        def again(item: Any) -> str:
            return self.value(item, name)

        if isinstance(value, fx.Node):
            return name(value)
        if isinstance(value, slice):
            parts = ["" if part is None else again(part) for part in (value.start, value.stop)]
            return ":".join(parts if value.step is None else [*parts, again(value.step)])
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(again, value))
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k}: {again(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, (torch.layout, torch.memory_format)):
            return str(value).removeprefix("torch.")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.symbols.text(value)
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, torch.Tensor):
            return f"tensor {_type_text(value, self.symbols)}"
        if type(value) is int and value == _LAST:
            return "end"
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return repr(value)
        if isinstance(value, torch.device):
            return str(value)
        if value is ...:
            return "..."
        return str(getattr(value, "__name__", type(value).__name__))

    def call(self, node: fx.Node, name: Callable[[fx.Node], str]) -> str:
        """Target and arguments of a call; the nodes among the arguments are named by ``name``."""
        args, kwargs = _without_defaults(node)
        texts = [self.value(arg, name) for arg in args]
        target = target_text(node)
        if target == "getitem" and len(texts) == 2:
            index = texts[1].removeprefix("(").removesuffix(")")
            return f"{texts[0]}[{index}]"
        texts += [f"{key}={self.value(kwargs[key], name)}" for key in sorted(kwargs)]
        return f"{target}({', '.join(texts)})"

    def line(self, node: fx.Node, *, site: bool = True) -> str:
        """A node's line; ``site`` adds what was done to its site."""
        if node.op == "output":
            leaves = [self.value(leaf, self.name) for leaf in _leaves(node.args)]
            return f"return {', '.join(leaves)}"
        own = self.type(node)
        label = f"{self.name(node)}: {own}" if own else self.name(node)
        if node.op == "placeholder":
            return f"{label} = {'input' if parameter_name(self.gm, node) is None else 'parameter'}"
        if node.op == "get_attr":
            return f"{label} = {self.kind(node)}"
        line = f"{label} = {self.call(node, self.name)}"
        return f"{line}  # {self.site(node)}" if site and node.name in self.sites else line

    def kind(self, node: fx.Node) -> str:
        value = _attribute(self.gm, str(node.target))
        if isinstance(value, torch.nn.Parameter):
            return "parameter"
        if isinstance(value, torch.Tensor):
            return "buffer"
        return "graph" if isinstance(value, torch.nn.Module) else "constant"

    def site(self, node: fx.Node) -> str:
        name, format, ranks = self.sites[node.name]
        return f"{name}: {format_text(format, ranks)}"

    def lines(self, indent: str = "  ") -> Iterator[str]:
        read: set[str] = set()
        for node in self.gm.graph.nodes:
            # A parameter that is read twice is still one parameter.
            if _is_check(node) or (node.op == "get_attr" and str(node.target) in read):
                continue
            read.update([str(node.target)] if node.op == "get_attr" else [])
            yield indent + self.line(node)
        for path, graph in _inner_graphs(self.gm).items():
            yield f"{indent}graph {path}:"
            yield from _GraphText(graph, self.symbols).lines(indent + "  ")


def _leaves(value: Any) -> Iterator[Any]:
    """The entries of nested tuples, lists and dicts, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _without_defaults(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a node less those that only repeat the operator's defaults."""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return args, kwargs

    def repeats(value: Any, argument: Any) -> bool:
        if not argument.has_default_value() or isinstance(value, fx.Node):
            return False
        default = argument.default_value
        if isinstance(value, torch.dtype):  # schemas keep dtypes as numbers
            return False
        return type(value) is type(default) and value == default

    while args and len(args) <= len(schema.arguments):
        if not repeats(args[-1], schema.arguments[len(args) - 1]):
            break
        args.pop()
    by_name = {argument.name: argument for argument in schema.arguments}
    kwargs = {k: v for k, v in kwargs.items() if k not in by_name or not repeats(v, by_name[k])}
    return args, kwargs


def print_graph(gm: fx.GraphModule) -> str:
    """A stable text of an FX graph: one line a node, in topological order.

    ``linear: f32[2, 16] = aten.linear(x, fc1.weight, fc1.bias)``: name, dtype and shape of the
    result (from ``meta["val"]`` or ``meta["tensor_meta"]``), short name of the operator, arguments.
    Parameters carry their qualified names, whether the graph reads them with ``get_attr`` or as
    placeholders that ``gm.meta["tensorize_names"]`` (placeholder name → qualified name) maps.
    Where ``gm.meta["tensorize_sites"]`` names a node, its site, format and ranks follow it. Graphs
    inside (of higher-order operators) follow the graph that uses them, indented.
    """
    text = _GraphText(gm)
    inputs = [
        node.name
        for node in gm.graph.nodes
        if node.op == "placeholder" and parameter_name(gm, node) is None
    ]
    return "\n".join([f"graph({', '.join(inputs)}):", *text.lines()]) + "\n"


# ----------------------------------------------------------------------------------- differences


@dataclass
class _Side:
    """One of two graphs: its calls, and what makes two of them the same operation."""

    gm: fx.GraphModule
    text: _GraphText = field(init=False)
    nodes: list[fx.Node] = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.text = _GraphText(self.gm)
        for node in self.gm.graph.nodes:  # symbols by appearance, parameters' included
            self.text.type(node)
        self.nodes = [
            node
            for node in self.gm.graph.nodes
            if not (_is_check(node) or parameter_name(self.gm, node) is not None)
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
            return f"return {len(list(_leaves(node.args)))}"
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
    """The longest increasing series of lines that occur exactly once on both sides.

    Layers of a model look alike, so matching the longest stretch first can pair one layer with
    another; a norm with its own parameters can not be mistaken (the idea of patience diff).
    """
    in_a, in_b = Counter(a), Counter(b)
    where = {key: k for k, key in enumerate(b) if in_b[key] == 1}
    pairs = [(k, where[key]) for k, key in enumerate(a) if in_a[key] == 1 and key in where]
    tails: list[int] = []
    best: list[int] = []  # index into pairs that ends the best series of each length
    before: list[int] = []
    for index, (_, position) in enumerate(pairs):
        length = bisect_left(tails, position)
        before.append(best[length - 1] if length else -1)
        if length == len(tails):
            tails.append(position)
            best.append(index)
        else:
            tails[length], best[length] = position, index
    series: list[tuple[int, int]] = []
    index = best[-1] if best else -1
    while index >= 0:
        series.append(pairs[index])
        index = before[index]
    return series[::-1]


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
    formats = ", ".join(dict.fromkeys(format_text(site[1], site[2]) for site in sites))
    right = ": ".join(part for part in (formats, after_text) if part)
    if gone or right:
        heading = f"@@ {lead and lead[:-1] + ': '}{before_text or 'nothing'} → {right or 'nothing'}"
        yield heading if len(heading) <= 100 else heading.replace(" → ", "\n   → ")
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
    for path, inner in _inner_graphs(before).items():
        other = _inner_graphs(after).get(path)
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
    sizes = " → ".join(plural(len(side.nodes), "node") for side in (old, new))
    yield f"{sizes}, changed in {plural(changed, 'place')}"
    for block in blocks:
        same, _, _, start, stop = block
        if not same:
            yield from _hunk(old, new, block)
        elif stop - start > 1:
            yield f"  … {plural(stop - start, 'node')} unchanged"
        else:
            yield f"  {new.text.line(new.nodes[start], site=False)}"


def _inner_graphs(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graphs that a graph hands to higher-order operators, by path."""
    paths = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    found = {path: _attribute(gm, path) for path in paths}
    return {path: graph for path, graph in found.items() if isinstance(graph, fx.GraphModule)}
