"""Tables, quantities, the text of graphs and their differences: golden text, written here."""

from __future__ import annotations

import fnmatch
import io
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from tensorize.base import printer
from tensorize.graphview.diff import diff_graphs
from tensorize.graphview.text import dtype_text, print_graph


class Block(nn.Module):
    """A linear layer, dense or as two linear layers in a row, between two other operations."""

    def __init__(self, low_rank: bool) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Linear(8, 16)
        if low_rank:
            self.fc1 = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 16))
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x))).softmax(-1)


def export(model: nn.Module, *args: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args) if dynamic else None
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    graph = program.graph_module
    graph.meta["tensorize_names"] = dict(program.graph_signature.inputs_to_parameters)
    return graph


@pytest.fixture(scope="module")
def before() -> fx.GraphModule:
    return export(Block(low_rank=False), torch.zeros(2, 8))


@pytest.fixture(scope="module")
def after() -> fx.GraphModule:
    graph = export(Block(low_rank=True), torch.zeros(2, 8))
    site = ("fc1.weight", "low_rank", (4,), None)
    graph.meta["tensorize_sites"] = {"linear": site, "linear_1": site}
    return graph


# ------------------------------------------------------------------------------------ quantities


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (768, "768"),
        (390.042, "390"),  # a rate
        (2.5, "2.50"),
        (1000, "1.00 K"),
        (589_824, "590 K"),
        (999_499, "999 K"),
        (999_600, "1.00 M"),
        (11_700_000, "11.7 M"),
        (1_300_000_000, "1.30 G"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert printer.count(value) == text


def test_bytes_are_powers_of_a_thousand() -> None:
    assert [printer.bytes_(n) for n in (12, 2048, 26_500_000)] == ["12 B", "2.05 kB", "26.5 MB"]


def test_percent() -> None:
    shares = (0, 1e-3, 0.0999, 0.1, 0.99999, 1.5)
    texts = ["0 %", "0.100 %", "9.99 %", "10.0 %", "100 %", "150 %"]
    assert [printer.percent(share) for share in shares] == texts


def test_seconds() -> None:
    times = (0, 2e-9, 85e-6, 0.9996e-3, 0.312, 4.21, 59.96, 125, 3600, 3780)
    texts = ["0 s", "2.00 ns", "85.0 µs", "1.00 ms", "312 ms", "4.21 s"]
    texts += ["1 min 00 s", "2 min 05 s", "1 h 00 min", "1 h 03 min"]
    assert [printer.seconds(time) for time in times] == texts


def test_number() -> None:
    values = (None, 0.0, 0.0312, 0.99999, 3.1e-8, float("inf"), float("nan"))
    texts = ["–", "0", "0.0312", "1.00", "3.10e-08", "inf", "nan"]
    assert [printer.number(value) for value in values] == texts
    assert printer.number(0.0312, 2) == "0.031"


def test_format_text() -> None:
    assert printer.format_text("dense", ()) == "dense"
    assert printer.format_text("low_rank", (64,)) == "low rank 64"
    assert printer.format_text("tt", (8, 12, 8)) == "TT 8·12·8"


# ---------------------------------------------------------------------------------------- tables


def test_table_golden() -> None:
    rows = [("fc1.weight", 128, "low rank 4"), ("embedding", 4096, "kept dense")]
    assert printer.table(("site", "parameters", "format"), rows) == (
        "site        parameters  format\n"
        "----------  ----------  ----------\n"
        "fc1.weight         128  low rank 4\n"
        "embedding         4096  kept dense"
    )


def test_table_shortens_names_and_wraps_prose() -> None:
    name = "bert.encoder.layer.11.attention.self.query.weight"
    text = printer.table(
        ("site", "n", "why"),
        [(name, 768, "no rank below 96 is faster than the dense weight on this machine")],
        width=60,
        align=["left", "right", "wrap"],
    )
    assert text == (
        "site                        n  why\n"
        "------------------------  ---  -----------------------------\n"
        "bert.*11.*query.weight    768  no rank below 96 is faster\n"
        "                               than the dense weight on this\n"
        "                               machine"
    )


def test_numbers_give_way_last() -> None:
    rows = [("a" * 60, "12345678", "because " * 12)]
    text = printer.table(("a", "n", "why"), rows, width=40, align=["left", "right", "end"])
    assert "12345678" in text


def test_names_keep_numbers_and_ends() -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert printer.shorten_name(name, 100) == name
    assert printer.shorten_name(name, 40) == "bert.*0.attention.self.query.weight"
    assert printer.shorten_name(name, 30) == "bert.*0.*self.query.weight"
    assert printer.shorten_name(name, 20) == "*0.*query.weight"
    assert printer.shorten_name("x" * 30, 11) == "xxxxx*xxxxx"


def test_table_without_rows() -> None:
    assert printer.table(("site", "n"), []) == "site  n\n----  -"


def test_table_refuses_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="needs 2 cells"):
        printer.table(("a", "b"), [("x",)])
    with pytest.raises(ValueError, match="align needs 2"):
        printer.table(("a", "b"), [("x", "y")], align=["left"])


@given(
    st.lists(st.tuples(st.text(max_size=200), st.integers(), st.text(max_size=300)), max_size=4),
    st.integers(12, 110),
)
def test_a_table_cuts_no_figure_and_is_no_wider_for_anything_else(
    rows: list[tuple[str, int, str]], width: int
) -> None:
    rows = [(name, n % 10**4, text) for name, n, text in rows]
    aligns: list[list[printer.Align]] = [["left", "right", "wrap"], ["end", "keep", "wrap"]]
    for align in aligns:
        lines = printer.table(("site", "n", "why"), rows, width=width, align=align).split("\n")
        names = {" ".join(printer.plain(row[0]).split()) for row in rows}
        least = 8 if align[0] == "end" else max((8, *map(len, names)))
        assert max(map(len, lines)) <= max(width, least + 4 + 8 + 4)
        assert len(lines) >= 2 + len(rows)
        assert all(any(str(row[1]) in line for line in lines[2:]) for row in rows)


@pytest.mark.parametrize("width", [30, 60, 90, 200])
def test_figures_stay_whole_at_every_width(width: int) -> None:
    rows = [("1.48 MB", "2.91e-06 to 4.46e-06", "79.6 us, 236 us, 1.60 ms")]
    headers, align = ("bytes held", "90 % interval", "times"), ("right", "keep", "list")
    lines = printer.table(headers, rows, width=width, align=align).split("\n")
    text = " ".join(" ".join(lines).split())
    for figure in ("1.48 MB", "2.91e-06 to 4.46e-06", "79.6 us,", "236 us,", "1.60 ms", "held"):
        assert figure in text
    assert width < 60 or max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [20, 40, 60, 100])
def test_no_two_weights_get_one_name(width: int) -> None:
    names = [
        f"blocks.{k}.{part}.weight"
        for k in range(3)
        for part in ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")
    ]
    rows = [(name, 36864, "its parameters are worth more here") for name in names]
    lines = printer.table(("w", "n", "why"), rows, width=width, align=["left", "right", "wrap"])
    shown = [line.split()[0] for line in lines.split("\n")[2:] if "36864" in line]
    assert len(set(shown)) == len(names)
    for name, pattern in zip(names, shown, strict=True) if width >= 40 else ():
        # What is shown can be asked for.
        assert [n for n in names if fnmatch.fnmatchcase(n, pattern)] == [name]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_a_table_goes_to_any_pipe(encoding: str) -> None:
    cells = ["TT 8·12·8", "4×16", "85.0 µs", "a → b", "–", "x…y", "(x Wᵀ) · y"]
    text = printer.table(["ein Name"], [[cell] for cell in cells])
    assert text.encode(encoding).decode(encoding) == text
    for cell in ("TT 8-12-8", "4x16", "85.0 us", "a -> b", "(x W^T) * y"):
        assert cell in text


def test_letters_of_a_name_stay_where_there_are_such(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printer.plain("größer × 2") == "größer x 2"
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert printer.plain("größer × 2") == "gr\\xf6\\xdfer x 2"


# ---------------------------------------------------------------------------------------- graphs


def test_graph_golden(before: fx.GraphModule) -> None:
    assert print_graph(before) == (
        "graph(x):\n"
        "  fc1.weight: f32[16, 8] = parameter\n"
        "  fc1.bias: f32[16] = parameter\n"
        "  fc2.weight: f32[4, 16] = parameter\n"
        "  fc2.bias: f32[4] = parameter\n"
        "  x: f32[2, 8] = input\n"
        "  linear: f32[2, 16] = aten.linear(x, fc1.weight, fc1.bias)\n"
        "  relu: f32[2, 16] = aten.relu(linear)\n"
        "  linear_1: f32[2, 4] = aten.linear(relu, fc2.weight, fc2.bias)\n"
        "  softmax: f32[2, 4] = aten.softmax(linear_1, -1)\n"
        "  return softmax\n"
    )


def test_graph_shows_sites(after: fx.GraphModule) -> None:
    text = print_graph(after)
    line = "linear: f32[2, 4] = aten.linear(x, fc1.0.weight)  # fc1.weight: low rank 4\n"
    assert line in text


def test_lifted_and_unlifted_parameters_print_the_same(before: fx.GraphModule) -> None:
    model = Block(low_rank=False)
    module = torch.export.export(model, (torch.zeros(2, 8),)).module()
    assert isinstance(module, fx.GraphModule)
    assert print_graph(module) == print_graph(before)


def test_dynamic_sizes_are_numbered_by_appearance() -> None:
    graph = export(Block(low_rank=False), torch.zeros(3, 8), dynamic=True)
    text = print_graph(graph)
    assert "x: f32[s0, 8] = input" in text
    assert "softmax: f32[s0, 4]" in text


def test_graph_of_modules_methods_and_functions() -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.shift = nn.Buffer(torch.zeros(3))
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.inner(x * self.scale + self.shift).to(torch.float64)
            return {"first": y[:, None, ..., 0], "second": torch.clamp(y, min=0.5)}

    assert print_graph(fx.symbolic_trace(Traced())) == (
        "graph(x):\n"
        "  x = input\n"
        "  scale: f32[3] = parameter\n"
        "  mul = mul(x, scale)\n"
        "  shift: f32[3] = buffer\n"
        "  add = add(mul, shift)\n"
        "  inner = module inner(add)\n"
        "  to = .to(inner, f64)\n"
        "  getitem = to[:, None, ..., 0]\n"
        "  clamp = clamp(to, min=0.5)\n"
        "  return getitem, clamp\n"
    )


def test_graphs_inside_follow() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x + 1
            return y * x

    text = print_graph(export(Branch(), torch.zeros(3)))
    assert "wrap_with_set_grad_enabled(False, submod_1, x)" in text
    assert "  graph submod_1:\n    x: f32[3] = input\n    add: f32[3] = aten.add(x, 1)\n" in text
    assert "0x" not in text


def test_dtypes() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    names = ["f32", "bf16", "i64", "u8", "bool", "c64"]
    assert [dtype_text(dtype) for dtype in dtypes] == names
    assert dtype_text(torch.float8_e4m3fn) == "f8_e4m3fn"


# ----------------------------------------------------------------------------------- differences


def test_diff_golden(before: fx.GraphModule, after: fx.GraphModule) -> None:
    assert diff_graphs(before, after) == (
        "6 nodes -> 7 nodes, changed in 1 place\n"
        "  x: f32[2, 8] = input\n"
        "@@ fc1: weight f32[16, 8], bias f32[16]\n"
        "   -> low rank 4: 0.weight f32[4, 8], 1.weight f32[16, 4], 1.bias f32[16]\n"
        "- linear: f32[2, 16] = aten.linear(x, fc1.weight, fc1.bias)\n"
        "+ linear: f32[2, 4] = aten.linear(x, fc1.0.weight)\n"
        "+ linear_1: f32[2, 16] = aten.linear(linear, fc1.1.weight, fc1.1.bias)\n"
        "  ... 4 nodes unchanged\n"
    )


def test_renumbered_nodes_are_no_difference(before: fx.GraphModule) -> None:
    copy = fx.GraphModule(before, fx.Graph())
    names: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(before.graph.nodes):
        names[node] = copy.graph.node_copy(node, names.__getitem__)
        if node.op == "call_function":
            names[node].name = f"other_{number}"
    copy.meta.update(before.meta)
    assert diff_graphs(before, copy) == "no differences: 6 nodes unchanged\n"


class Wired(nn.Module):
    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.crossed = crossed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.sin(x), torch.cos(x)
        return torch.tanh(second if self.crossed else first) + second


def test_a_node_that_reads_another_result_is_a_difference() -> None:
    x = torch.zeros(3)
    text = diff_graphs(export(Wired(False), x), export(Wired(True), x))
    assert "changed in 1 place" in text
    assert "- tanh: f32[3] = aten.tanh(sin)\n+ tanh: f32[3] = aten.tanh(cos)\n" in text


class Layers(nn.Module):
    """Layers that look alike; ``rewritten`` names those whose linear is two."""

    def __init__(self, count: int, rewritten: set[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.linears = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)) if k in rewritten else nn.Linear(8, 8)
            for k in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + torch.relu(linear(norm(x)))
        return x


def test_layers_that_look_alike_are_not_mixed_up() -> None:
    x = torch.zeros(2, 8)
    text = diff_graphs(export(Layers(5, set()), x), export(Layers(5, {0, 3}), x))
    assert "changed in 2 places" in text
    headings = [line for line in text.split("\n") if line.startswith("@@")]
    assert [heading.split(":")[0] for heading in headings] == ["@@ linears.0", "@@ linears.3"]
    assert text.count("\n- ") == 2
    assert text.count("\n+ ") == 4
