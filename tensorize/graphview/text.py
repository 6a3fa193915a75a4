"""FX graphs and their differences as plain text.

The text of a graph is ours, so that golden files survive a new torch: no addresses, no versions,
no overload names, symbols of dynamic shapes numbered by appearance, defaults left out.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from tensorize.base.dynamo import VALUE
from tensorize.base.printer import format_text


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
    for key in ("val", VALUE, "tensor_meta"):
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
        return f"({', '.join(_type_text(v, symbols) or '-' for v in value)})"
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


def is_check(node: fx.Node) -> bool:
    """Whether a node only checks the inputs; where torch puts such nodes differs by version."""
    return node.op == "call_module" and node.target == "_guards_fn" and not node.users


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


class GraphText:
    """The lines of one graph."""

    def __init__(self, gm: fx.GraphModule, symbols: _Symbols | None = None) -> None:
        self.gm, self.symbols = gm, symbols or _Symbols()
        self.sites: Mapping[str, tuple[str, str, Sequence[int], str | None]]
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
            leaves = [self.value(leaf, self.name) for leaf in leaves_of(node.args)]
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
        name, format, ranks, precision = self.sites[node.name]
        return f"{name}: {format_text(format, ranks, precision)}"

    def lines(self, indent: str = "  ") -> Iterator[str]:
        read: set[str] = set()
        for node in self.gm.graph.nodes:
            # A parameter that is read twice is still one parameter.
            if is_check(node) or (node.op == "get_attr" and str(node.target) in read):
                continue
            read.update([str(node.target)] if node.op == "get_attr" else [])
            yield indent + self.line(node)
        for path, graph in inner_graphs(self.gm).items():
            yield f"{indent}graph {path}:"
            yield from GraphText(graph, self.symbols).lines(indent + "  ")


def leaves_of(value: Any) -> Iterator[Any]:
    """The entries of nested tuples, lists and dicts, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves_of(item)
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
    text = GraphText(gm)
    inputs = [
        node.name
        for node in gm.graph.nodes
        if node.op == "placeholder" and parameter_name(gm, node) is None
    ]
    return "\n".join([f"graph({', '.join(inputs)}):", *text.lines()]) + "\n"


def inner_graphs(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graphs that a graph hands to higher-order operators, by path."""
    paths = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    found = {path: _attribute(gm, path) for path in paths}
    return {path: graph for path, graph in found.items() if isinstance(graph, fx.GraphModule)}
