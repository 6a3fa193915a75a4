"""The graphs of a model: their text, their difference, their picture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn

from tensorize.base.errors import TensorizeError
from tensorize.graphview.graphs import Graphs

SVG = "{http://www.w3.org/2000/svg}"
Sites = dict[str, tuple[str, str, tuple[int, ...], str | None]]


class LowRank(nn.Sequential):
    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows))


class Layer(nn.Module):
    """A transformer's layer, norms first; ``rank`` 0 keeps its linear layers dense."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value, self.up = (
            LowRank(size, size, rank) if rank else nn.Linear(size, size) for _ in range(4)
        )
        self.out, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = self.query(y)[:, None], self.key(y)[:, None], self.value(y)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, 0]
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """An embedding, layers, and a head that is tied to the embedding."""

    def __init__(self, ranks: tuple[int, ...], size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, size)
        self.layers = nn.ModuleList(Layer(size, rank) for rank in ranks)
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()[None, None]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


def export(model: nn.Module, *args: torch.Tensor) -> fx.GraphModule:
    """The graph with both entries of ``meta`` that ``Graphs`` documents, for ``LowRank`` layers."""
    program = torch.export.export(model, args)
    graph, names = program.graph_module, dict(program.graph_signature.inputs_to_parameters)
    low_rank = {n for n, module in model.named_modules() if isinstance(module, LowRank)}
    sites: Sites = {}
    for node in graph.graph.nodes:
        for name in (names.get(source.name, "") for source in node.all_input_nodes):
            owner, _, last = name.rpartition(".")
            if last != "weight" or "norm" in name:
                continue
            layer = owner.rpartition(".")[0]
            if layer in low_rank:
                rank = model.get_submodule(layer)[0].out_features  # type: ignore[index]
                sites[node.name] = (f"{layer}.weight", "low_rank", (rank,), None)
            else:
                sites[node.name] = (name.replace("head", "embed"), "dense", (), None)
    graph.meta["tensorize_names"], graph.meta["tensorize_sites"] = names, sites
    return graph


@pytest.fixture(scope="module")
def transformer() -> Graphs:
    tokens = torch.zeros(2, 5, dtype=torch.long)
    return Graphs(export(Model((0,) * 6), tokens), export(Model((2, 3, 4, 2, 3, 4)), tokens))


@pytest.fixture(scope="module")
def small() -> Graphs:
    x = torch.zeros(2, 8)
    before = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    after = nn.Sequential(LowRank(16, 8, 4), nn.ReLU(), nn.Linear(16, 4))
    return Graphs(export(before, x), export(after, x))


def draw(graphs: Graphs, directory: Path) -> ElementTree.Element:
    path = directory / "graph.svg"
    graphs.to_svg(path)
    assert list(directory.iterdir()) == [path]
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


# ------------------------------------------------------------------------------------------ text


def test_print_readable_golden(small: Graphs) -> None:
    assert small.print_readable() == (
        "before\n"
        "graph(input):\n"
        "  0.weight: f32[16, 8] = parameter\n"
        "  0.bias: f32[16] = parameter\n"
        "  2.weight: f32[4, 16] = parameter\n"
        "  2.bias: f32[4] = parameter\n"
        "  input: f32[2, 8] = input\n"
        "  linear: f32[2, 16] = aten.linear(input, 0.weight, 0.bias)  # 0.weight: dense\n"
        "  relu: f32[2, 16] = aten.relu(linear)\n"
        "  linear_1: f32[2, 4] = aten.linear(relu, 2.weight, 2.bias)  # 2.weight: dense\n"
        "  return linear_1\n"
        "\n"
        "after\n"
        "graph(input):\n"
        "  0.0.weight: f32[4, 8] = parameter\n"
        "  0.1.weight: f32[16, 4] = parameter\n"
        "  0.1.bias: f32[16] = parameter\n"
        "  2.weight: f32[4, 16] = parameter\n"
        "  2.bias: f32[4] = parameter\n"
        "  input: f32[2, 8] = input\n"
        "  linear: f32[2, 4] = aten.linear(input, 0.0.weight)  # 0.weight: low rank 4\n"
        "  linear_1: f32[2, 16] = aten.linear(linear, 0.1.weight, 0.1.bias)"
        "  # 0.weight: low rank 4\n"
        "  relu: f32[2, 16] = aten.relu(linear_1)\n"
        "  linear_2: f32[2, 4] = aten.linear(relu, 2.weight, 2.bias)  # 2.weight: dense\n"
        "  return linear_2\n"
    )


def test_diff_golden(small: Graphs) -> None:
    assert small.diff() == (
        "5 nodes -> 6 nodes, changed in 1 place\n"
        "  input: f32[2, 8] = input\n"
        "@@ 0: weight f32[16, 8], bias f32[16]\n"
        "   -> low rank 4: 0.weight f32[4, 8], 1.weight f32[16, 4], 1.bias f32[16]\n"
        "- linear: f32[2, 16] = aten.linear(input, 0.weight, 0.bias)\n"
        "+ linear: f32[2, 4] = aten.linear(input, 0.0.weight)\n"
        "+ linear_1: f32[2, 16] = aten.linear(linear, 0.1.weight, 0.1.bias)\n"
        "  ... 3 nodes unchanged\n"
    )


def test_diff_of_a_transformer(transformer: Graphs) -> None:
    text = transformer.diff()
    headings = [line for line in text.split("\n") if line.startswith("@@")]
    assert [heading.split(":")[0].removeprefix("@@ ") for heading in headings] == [
        f"layers.{k}.{name}" for k in range(6) for name in ("query", "key", "value", "up")
    ]
    assert text.count("\n- ") == 24
    assert text.count("\n+ ") == 48
    assert repr(transformer).startswith("Graphs(before: ")


# --------------------------------------------------------------------------------------- picture


def test_picture_of_a_chain(small: Graphs, tmp_path: Path) -> None:
    assert texts(draw(small, tmp_path)) == [
        *["dense: 1 site", "low rank: 1 site", "other operations"],
        *["input", "0", "16×8 → low rank 4", "relu", "2", "4×16 dense", "output"],
    ]


def test_layers_are_folded(transformer: Graphs, tmp_path: Path) -> None:
    picture = draw(transformer, tmp_path)
    found = texts(picture)
    assert "× 6 · layers.0 … 5" in found
    assert found.count("query") == 1
    assert found.count("8×8 → low rank 2–4") == 4
    assert found.count("embed") == 2  # its two uses: at the beginning and, tied, at the end
    assert found[:3] == ["dense: 13 sites", "low rank: 24 sites", "other operations"]
    hints = "\n".join(element.text or "" for element in picture.iter(f"{SVG}title"))
    assert "layers.1.query.weight: low rank 3; layers.2.query.weight: low rank 4" in hints


def test_layers_of_another_format_are_not_folded(tmp_path: Path) -> None:
    tokens = torch.zeros(2, 5, dtype=torch.long)
    before, after = Model((0,) * 5), Model((0, 2, 2, 2, 2))
    found = texts(draw(Graphs(export(before, tokens), export(after, tokens)), tmp_path))
    assert "× 4 · layers.1 … 4" in found
    assert "layers.0.query" in found


def test_boxes_do_not_overlap(transformer: Graphs, tmp_path: Path) -> None:
    groups = draw(transformer, tmp_path).iter(f"{SVG}g")
    boxes = [rect for group in groups for rect in group.findall(f"{SVG}rect") if "x" in rect.attrib]
    places = [
        [float(box.attrib[key]) for key in ("x", "y", "width", "height")]
        for box in boxes
        if float(box.attrib["height"]) > 20  # not the legend's
    ]
    assert len(places) > 10
    for k, (x0, y0, width0, height0) in enumerate(places):
        for x1, y1, width1, height1 in places[:k]:
            beside = x0 + width0 <= x1 or x1 + width1 <= x0
            assert beside or y0 + height0 <= y1 or y1 + height1 <= y0


def test_picture_needs_nothing_else(transformer: Graphs, tmp_path: Path) -> None:
    draw(transformer, tmp_path)
    text = (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert not re.search(r"href|<script|<image|@import|url\((?!#)", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]


def test_picture_escapes_names(tmp_path: Path) -> None:
    graph = export(nn.Linear(4, 4), torch.zeros(1, 4))
    name = '<b>&"\x00.weight'
    graph.meta["tensorize_sites"] = {"linear": (name, "tt", (2, 3), None)}
    found = texts(draw(Graphs(graph, graph), tmp_path))
    assert '<b>&"' in found
    assert "→ TT 2·3" in found


@pytest.mark.parametrize("kind", ["no site", "no node", "modules", "two outputs", "unused input"])
def test_odd_graphs_are_drawn(kind: str, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if kind == "two outputs":
                return self.inner(x), x + y
            return (self.inner(x).view(-1),)

    if kind == "no node":
        empty = fx.Graph()
        empty.output(None)
        graph = fx.GraphModule(nn.Module(), empty)
    elif kind == "modules":
        graph = fx.symbolic_trace(Odd())
    else:
        graph = export(Odd(), torch.zeros(2, 4), torch.zeros(2, 4))
    if kind == "no site":
        del graph.meta["tensorize_sites"]
    assert texts(draw(Graphs(graph, graph), tmp_path))[-1] == "output"


def test_views_of_parameters_are_not_drawn(tmp_path: Path) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(nn.functional.linear(x, self.core.t()))

    graph = export(Transposed(), torch.zeros(2, 3))
    graph.meta["tensorize_sites"] = {"linear": ("layer.weight", "low_rank", (3,), None)}
    found = texts(draw(Graphs(graph, graph), tmp_path))
    assert found[2:] == ["x", "layer", "→ low rank 3", "relu", "output"]


def test_a_site_that_is_used_twice_in_a_circle_stays_two_boxes(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return torch.addmm(y, torch.sin(y), self.inner.weight)

    found = texts(draw(Graphs(*[export(Twice(), torch.zeros(2, 4))] * 2), tmp_path))
    assert found.count("inner") == 2


def test_directory_must_exist(small: Graphs, tmp_path: Path) -> None:
    with pytest.raises(TensorizeError, match="does not exist"):
        small.to_svg(tmp_path / "missing" / "graph.svg")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_picture_in_a_browser(transformer: Graphs, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    draw(transformer, tmp_path)
    picture = tmp_path / "graph.png"
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [str(CHROMIUM), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--screenshot={picture}", "--window-size=800,1200"]
    command.append((tmp_path / "graph.svg").as_uri())
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr
    with image.open(picture) as shot:
        assert len(shot.convert("RGB").getcolors(maxcolors=10**6)) > 50
