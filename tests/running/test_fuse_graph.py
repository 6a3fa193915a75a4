"""What kernels take in of a graph: norms, elementwise work, weights of one input; and what not."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tensorize
from tensorize import TTSpec
from tensorize.codegen.device import autotune, launch, reference
from tensorize.codegen.device.triton_env import interpreting
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton import tiles
from tensorize.graphview.text import print_graph
from tensorize.ir.work import (
    Epilogue,
    Norm,
    Work,
    work_of,
)
from tensorize.passes.lowering.graph import Lowered, own_graph
from tensorize.running.fuse_graph import fuse
from tensorize.running.in_use import launches, use_kernels
from tensorize.weight.whole_model import settle
from tests.kernels import each_device, here, holds_under_the_interpreter
from tests.models import CASES, relative
from tests.paths import GOLDEN


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_everything_holds_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    holds_under_the_interpreter(__file__)


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, "slow")


# ------------------------------------------------------------------------------ small graphs


class RMSNorm(nn.Module):
    """As Hugging Face writes it, with ``shift`` as Gemma does; another ``power`` is none."""

    def __init__(self, width: int, shift: float = 0.0, power: int = 2) -> None:
        super().__init__()
        self.weight, self.shift, self.power = nn.Parameter(torch.randn(width)), shift, power

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(self.power).mean(-1, keepdim=True) + 1e-6)
        weight = self.weight + self.shift if self.shift else self.weight
        return weight * x.to(dtype)


class Block(nn.Module):
    """A norm, three weights of one input, and whatever ``behind`` does with them."""

    def __init__(self, behind: Callable[..., Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, x, self.norm(x))


def by_kernels(model: nn.Module, **options: object) -> nn.Module:
    return tensorize.compile(
        model.eval(),
        None,
        example_inputs=(torch.randn(5, 24),),
        formats=options.get("formats", "low_rank"),
        ranks=options.get("ranks", {"*": 6}),
        metric="frobenius",
        refine=None,
        backend="triton",
    )


def lowered(model: nn.Module, *inputs: Tensor, **options: object) -> Lowered:
    """The graph of a model that runs by kernels, after fusing."""
    small = by_kernels(model, **options)
    return traced(small, *inputs)


def traced(small: nn.Module, *inputs: Tensor) -> Lowered:
    torch._dynamo.reset()  # so that these very shapes are seen
    seen: list[Lowered] = []

    def keep(graph: fx.GraphModule, values: list) -> object:
        seen.append(fuse(graph, values, launches()))
        return seen[-1].graph.forward if interpreting() else lambda *_: _stand_in(graph)

    with torch.no_grad():
        torch.compile(small, backend=keep)(*inputs)
    return seen[0]


def _stand_in(graph: fx.GraphModule) -> tuple[Tensor, ...]:
    """Results of the right shapes, where kernels cannot run."""
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    return tuple(torch.zeros(result.meta["example_value"].shape) for result in results)


def fused(model: nn.Module, *inputs: Tensor, **options: object) -> list[str]:
    """What every launch of the graph takes in."""
    return [work.fused for work, _ in lowered(model, *(inputs or (X,)), **options).fused]


X = torch.randn(5, 24)
EAGER = {"inner": "eager"}


def three(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return (m.a(y) + 1).relu() - (m.b(y) + 1).relu() * (m.c(y) + 1)


def swiglu(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + m.c(F.silu(m.a(y)) * m.b(y))


def mlp(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + 0.5 * m.b(F.gelu(m.a(y), approximate="tanh"))


FUSED = {
    "rms norm and three weights": (Block(three, RMSNorm(24)), ["rms norm, 3 weights"]),
    "nn.RMSNorm": (Block(three, nn.RMSNorm(24, eps=1e-5)), ["rms norm, 3 weights"]),
    "a gain that is computed": (Block(three, RMSNorm(24, shift=1.0)), ["rms norm, 3 weights"]),
    "layer norm": (Block(three, nn.LayerNorm(24)), ["layer norm, 3 weights"]),
    "gated": (Block(swiglu, RMSNorm(24)), ["rms norm, 2 weights, silu, gated", "residual"]),
    "an MLP": (Block(mlp), ["gelu_tanh", "scale 0.5, residual"]),
    "dropout between": (
        Block(lambda m, x, y: x + F.dropout(m.a(F.dropout(y, 0.1, m.training)), 0.1, m.training)),
        ["residual"],
    ),
    "relu": (Block(lambda m, x, y: m.b(torch.relu(m.a(y)))), ["relu"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_launch_takes_in_what_is_around_its_weights(name: str) -> None:
    model, wanted = FUSED[name]
    assert fused(model) == wanted


@each_device
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_graph_computes_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    small = by_kernels(copy.deepcopy(FUSED[name][0])).to(device)
    exact = tensorize.densify(small).double()
    small = small.to(dtype)
    if dtype == torch.bfloat16:  # what was rounded is what the oracle has
        exact = tensorize.densify(small).double()
    for rows in (1, 5, 40):
        x = torch.randn(rows, 24, device=device).to(dtype)
        with torch.no_grad():
            y = torch.compile(small, backend="tensorize", options=EAGER)(x)
            assert y.dtype == dtype
            # Three roundings in a row: of the norm, of what is between the factors, of the result.
            assert relative(y, exact(x.double())) < 6 * torch.finfo(dtype).eps


@each_device
def test_a_norm_without_an_eps_has_that_of_the_dtype_it_is_computed_in(device: str) -> None:
    """Which for small entries in bfloat16 decides how large they become."""
    small = by_kernels(Block(three, nn.RMSNorm(24))).to(device).bfloat16()
    x = (0.01 * torch.randn(40, 24, device=device)).bfloat16()
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 2**-23).rsqrt()
    dense = tensorize.densify(small).double()
    dense.norm = nn.Identity()
    with torch.no_grad():
        wanted = dense.behind(dense, x.double(), normed)
        y = torch.compile(small, backend="tensorize", options=EAGER)(x)
    assert relative(y, wanted) < 6 * torch.finfo(torch.bfloat16).eps


def test_the_text_of_a_fused_graph_is_golden() -> None:
    """``UPDATE_GOLDEN=1`` writes it again."""
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, values: list) -> object:
        graphs.append(own_graph(graph))
        return lambda *_: _stand_in(graph)

    with torch.no_grad():
        torch.compile(small, backend=keep)(X)
    after = traced(small, X).graph
    text = print_graph(graphs[0]) + "\n\n" + print_graph(after) + "\n"
    path = GOLDEN / "fused_graph.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


# ------------------------------------------------------------------------- what must not be fused


def twice(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return three(m, x, y) + y


def activated_twice(m: Block, x: Tensor, y: Tensor) -> Tensor:
    a = m.a(y)
    return F.silu(a) * m.b(y) + a


def written_to(m: Block, x: Tensor, y: Tensor) -> Tensor:
    y = y + 1
    a = m.a(y)
    y.view(-1).mul_(2)
    return a - m.b(y)


def residual_written(m: Block, x: Tensor, y: Tensor) -> Tensor:
    y = y + 1
    y[0] = m.b(x)[0]
    return m.a(x * 2) + y


def broadcast(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return m.a(y) + x[:1]


def in_place(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return m.a(F.relu(m.b(y), inplace=True) + x)


NOT_FUSED = {
    "a norm that something else reads": (Block(twice, RMSNorm(24)), ["3 weights"]),
    "another mean than that of squares": (Block(three, RMSNorm(24, power=4)), ["3 weights"]),
    "a norm over more than the last axis": (Block(three, nn.LayerNorm((5, 24))), ["3 weights"]),
    "a norm without a gain": (
        Block(three, nn.LayerNorm(24, elementwise_affine=False)),
        ["3 weights"],
    ),
    "a product of which something else reads a part": (Block(activated_twice), ["2 weights"]),
    "an input that is written to": (Block(written_to), []),
    "a residual that is written to": (Block(residual_written), []),
    "a residual of another shape": (Block(broadcast), []),
    "an activation in place": (Block(in_place), []),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_must_not_be_fused_is_not(name: str) -> None:
    model, wanted = NOT_FUSED[name]
    assert fused(model) == wanted


@here
@pytest.mark.parametrize("name", NOT_FUSED)
def test_and_its_numbers_are_right(name: str) -> None:
    small = by_kernels(copy.deepcopy(NOT_FUSED[name][0]))
    exact = tensorize.densify(small).double()
    with torch.no_grad():
        y = torch.compile(small, backend="tensorize", options=EAGER)(X)
        assert relative(y, exact(X.double())) < 1e-6


def test_a_train_takes_no_norm_and_is_no_part_of_a_group() -> None:
    formats, ranks = {"a.weight": "tt", "*": "low_rank"}, {"a.weight": "full", "*": 6}
    model = Block(three, nn.LayerNorm(24))
    assert fused(model, X, formats=formats, ranks=ranks) == ["2 weights"]


@here
def test_nothing_is_fused_where_there_are_gradients() -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    compiled = torch.compile(small, backend="tensorize", options=EAGER)
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in small.named_parameters()}
    mine, x.grad = x.grad, None
    small.zero_grad()
    small(x).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
    assert tensorize.report(small).fused == ()
    small.requires_grad_(False)  # and where only the input has one
    torch._dynamo.reset()
    (of_x,) = torch.autograd.grad(
        torch.compile(small, backend="tensorize", options=EAGER)(x).square().sum(), x
    )
    torch.testing.assert_close(of_x, mine)


def test_a_model_that_runs_by_torch_operations_is_left_alone() -> None:
    model = Block(three, RMSNorm(24)).eval()
    small = tensorize.compile(
        model, None, example_inputs=(X,), ranks={"*": 6}, formats="low_rank", backend="aten"
    )
    assert traced(small, X).fused == ()


# ------------------------------------------------------------------- one first factor for several


def of_one_first_factor() -> nn.Module:
    """A gated layer whose gate and up have their first factor in common."""
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    small.b.first.weight = small.a.first.weight
    settle(small)
    return small


def test_weights_of_one_first_factor_are_one_launch_with_one_product() -> None:
    works = [work for work, _ in traced(of_one_first_factor(), X).fused]
    assert [work.fused for work in works] == [
        "rms norm, 2 weights of one first factor, silu, gated",
        "residual",
    ]


@here
def test_eager_and_compiled_they_compute_their_product_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = of_one_first_factor()
    exact = tensorize.densify(small).double()(X.double())
    launched: list[str] = []
    launch_it = launch.run
    monkeypatch.setattr(
        launch, "run", lambda source, *t: (launched.append(source.name), launch_it(source, *t))
    )
    products = []
    small.a.first.register_forward_hook(lambda *_: products.append("a"))
    small.b.first.register_forward_hook(lambda *_: products.append("b"))
    linear = F.linear
    with torch.no_grad():
        assert relative(small(X), exact) < 1e-6
    assert products == ["a", "b"]  # hooks are kept: then every layer computes its own
    small.a.first._forward_hooks.clear()
    small.b.first._forward_hooks.clear()
    read: list[Tensor] = []
    monkeypatch.setattr(F, "linear", lambda x, w, *b: (read.append(w), linear(x, w, *b))[1])
    launched.clear()
    with torch.no_grad():
        assert relative(small(X), exact) < 1e-6
    assert sum(w is small.a.first.weight for w in read) == 1
    assert len(launched) == 1  # the third weight
    monkeypatch.setattr(F, "linear", linear)
    launched.clear()
    with torch.no_grad():
        assert relative(torch.compile(small, backend="tensorize", options=EAGER)(X), exact) < 1e-6
    assert launched == ["decode", "decode"]
    small(X).sum().backward()
    assert small.a.first.weight.grad is not None


# --------------------------------------------------------------------------- chosen by measurement


@pytest.fixture
def measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's cache of choices, empty, as if it were a GPU's."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "known", lambda device: True)
    autotune.forget()
    yield
    autotune.forget()


def record(work: Work, rows: int, ratio: float, family: str = "decode") -> None:
    cut = tiles.default_decode(work, torch.float32) if family == "decode" else tiles.Tiles(16, 16)
    choice = autotune.Choice(family, cut, ratio)
    autotune.keep(work, torch.float32, autotune.bucket(rows), "cpu", choice)


PLAIN = Work((TTSpec.low_rank(24, 24, 6),), epilogue=Epilogue(bias=True))


@pytest.mark.usefixtures("measured_here")
def test_a_launch_is_used_only_where_it_won() -> None:
    small = by_kernels(Block(mlp))

    def fused(x: Tensor) -> list[Work]:
        return [work for work, _ in traced(use_kernels(small, "auto"), x).fused]

    assert fused(X) == []
    gelu = replace(PLAIN, epilogue=Epilogue(bias=True, activation="gelu_tanh"))
    record(gelu, 5, ratio=0.99)
    assert fused(X) == []
    record(gelu, 5, ratio=0.5)
    assert fused(X) == [gelu]
    assert fused(torch.randn(17, 24)) == []  # where it was not measured


@pytest.mark.usefixtures("measured_here")
def test_weights_whose_kernels_never_won_are_the_librarys() -> None:
    small = by_kernels(Block(mlp))
    modules = [m for m in small.modules() if hasattr(m, "kernels")]
    assert all(m.kernels for m in modules)
    use_kernels(small, "auto")
    assert not any(m.kernels for m in modules)
    record(PLAIN, 5, ratio=0.5)
    use_kernels(small, "auto")
    assert [bool(m.kernels) for m in modules] == [m.spec == PLAIN.specs[0] for m in modules]
    use_kernels(small, "aten")
    assert not any(m.kernels for m in modules)


@pytest.mark.usefixtures("measured_here")
def test_the_report_names_the_winner_and_the_ratio_for_every_range_of_rows() -> None:
    model = Block(lambda m, x, y: m.a(y) + m.b(y) + m.c(y)).eval()
    record(PLAIN, 1, ratio=0.6)
    record(PLAIN, 16, ratio=1.5)
    record(PLAIN, 64, ratio=0.8, family="forward")
    small = tensorize.compile(
        model, None, example_inputs=(X,), formats="low_rank", ranks={"a.weight": 6, "b.weight": 4}
    )
    found = tensorize.report(small)
    sites = {site.name: [str(each) for each in site.runs_by] for site in found.sites}
    assert sites == {
        "a.weight": [
            "up to 1 rows: decode (the kernel takes 0.60 of the library's time)",
            "up to 16 rows: library (the kernel takes 1.50 of the library's time)",
            "up to 64 rows: forward (the kernel takes 0.80 of the library's time)",
            "65 rows and more: library (not measured)",
        ],
        "b.weight": ["1 rows and more: library (not measured)"],
        "c.weight": [],
    }
    assert "up to 64 rows: forward" in str(found)
    assert tensorize.Report.from_dict(found.to_dict()) == found


@here
@pytest.mark.usefixtures("measured_here")
def test_what_runs_is_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    record(PLAIN, 1, ratio=0.6)
    record(PLAIN, 16, ratio=1.5)
    small = use_kernels(by_kernels(Block(lambda m, x, y: m.a(y))), "auto")
    exact = tensorize.densify(small).double()
    launched: list[str] = []
    launch_it = launch.run
    monkeypatch.setattr(
        launch, "run", lambda source, *t: (launched.append(source.name), launch_it(source, *t))
    )
    with torch.no_grad():
        for rows, wanted in ((1, ["decode"]), (5, []), (30, [])):
            x = torch.randn(rows, 24)
            launched.clear()
            assert relative(small(x), exact(x.double())) < 1e-6
            assert launched == wanted
    launched.clear()
    small(torch.randn(1, 24)).sum().backward()  # nobody measures gradients
    assert launched == []


@pytest.mark.usefixtures("measured_here")
def test_what_is_timed_are_the_weights_and_what_graphs_offer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    timed: list[tuple[str, int]] = []
    told: list[tuple[str, int, int]] = []

    def tune(work: Work, dtype: torch.dtype, rows: int, device: str) -> autotune.Choice:
        timed.append((work.fused, rows))
        return autotune.Choice("decode", tiles.Tiles(), 0.5)

    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr("tensorize.running.tuning.device_of", lambda model: "cuda:0")
    monkeypatch.setattr(autotune, "recorded", lambda *_: None)
    monkeypatch.setattr(autotune, "_recorded", lambda *_: None)
    monkeypatch.setattr(autotune, "winners", cache(lambda device: frozenset()))
    won = tensorize.tune_kernels(
        small, [1], example_inputs=(X,), progress=lambda *step: told.append(step)
    )
    assert {what for what, _ in timed} == {
        "",
        "residual",
        "2 weights, silu, gated",
        "rms norm, 2 weights, silu, gated",
    }
    assert won == len(timed) == told[-1][1] == told[-1][2]
    assert tensorize.report(small).backend == "auto"


def test_the_launches_of_a_graph_can_be_read() -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    before = {name: module.__dict__.get("kernels") for name, module in small.named_modules()}
    alone, found = tensorize.kernels(small), tensorize.kernels(small, (X,))
    assert alone.keys() < found.keys()
    fused = {name: str(kernel) for name, kernel in found.items() if name not in alone}
    assert all(name.startswith("graph_") for name in fused)
    assert any("rms norm" in text and "silu(x W_0ᵀ) · (x W_1ᵀ)" in text for text in fused.values())
    assert {"graph_0.forward", "graph_0.decode"} <= fused.keys()
    # What it runs by is what it ran by.
    for name, module in small.named_modules():
        assert module.__dict__.get("kernels") is before[name]
    with pytest.raises(tensorize.CaptureError, match="do not fit"):
        tensorize.kernels(small, (torch.randn(2, 5),))


def test_every_operation_that_is_timed_has_its_inputs() -> None:
    work = Work(
        (TTSpec.low_rank(24, 20, 6), TTSpec.low_rank(24, 20, 6)),
        norm=Norm("layer", 1e-5),
        epilogue=Epilogue(bias=True, residual=True),
        gated=True,
        shared=True,
    )
    source = triton_source.forward(work, tiles.default(work, torch.float32))
    assert len(work.input_shapes(3)) == len(source.inputs) == 9
    assert work_of(work.to_text()) == work
    (y,) = reference.run(work, [torch.randn(shape) for shape in work.input_shapes(3)])
    assert y.shape == (3, 24)


# ------------------------------------------------------------------------------ saved and loaded


def test_a_saved_model_runs_by_what_it_was_compiled_for(tmp_path: Path) -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    tensorize.save(small, tmp_path)
    again = tensorize.load(tmp_path, Block(swiglu, RMSNorm(24)))
    found = tensorize.report(again)
    assert found.backend == "triton"
    assert len(traced(again, X).fused) == 2
    where = "as asked" if interpreting() else "move the model to a GPU"
    assert all(where in site.runs_by[0].why for site in found.sites)
    other = tensorize.compile(Block(mlp).eval(), 0.5, example_inputs=(X,), backend="aten")
    tensorize.save(other, tmp_path)
    again = tensorize.load(tmp_path, Block(mlp))
    assert tensorize.report(again).backend == "aten"
    assert traced(again, X).fused == ()


# -------------------------------------------------------------------------------- the operation


@here
def test_the_operation_passes_opcheck() -> None:
    work = Work((PLAIN.specs[0],) * 2, norm=Norm("rms", 1e-6))
    shapes = work.input_shapes(3)
    inputs = [torch.randn(shape) for shape in shapes]
    for x in (inputs[0], torch.randn(2, 3, 24), torch.randn(0, 24), torch.randn(24, 5).t()):
        torch.library.opcheck(torch.ops.tensorize.triton_fused, ([x, *inputs[1:]], work.to_text()))


# ------------------------------------------------------------------------------- real models


@here
@pytest.mark.parametrize(
    ("name", "ranks", "wanted"),
    [
        (
            "llama",
            {"*proj*": 4},
            {"rms norm, 3 weights": 6, "rms norm, 2 weights, silu, gated": 4, "residual": 4},
        ),
        ("bert", {"*encoder*": 4}, {"3 weights": 6, "gelu": 2, "residual": 4}),
    ],
)
def test_models_of_hugging_face(name: str, ranks: dict, wanted: dict) -> None:
    case = CASES[name]
    small = tensorize.compile(
        case.model(),
        None,
        example_inputs=case.batch(),
        ranks=ranks,
        formats={"*": "low_rank"},
        metric="frobenius",
        refine=None,
        backend="triton",
    )
    exact = case.output(tensorize.densify(small).double())
    report = str(tensorize.report(small))
    assert "fused" not in report
    assert "kernels (as asked)" in report
    compiled = torch.compile(small, backend="tensorize", options=EAGER)
    assert relative(case.output(compiled), exact) < 1e-6
    found = tensorize.report(small)
    assert {what: len(names) for what, names in found.fused} == wanted
    assert "fused in compiled graphs" in str(found)
    assert tensorize.Report.from_dict(found.to_dict()) == found


@here
@pytest.mark.slow
def test_inductor_takes_what_is_left() -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    exact = tensorize.densify(small).double()
    compiled = torch.compile(small, backend="tensorize", options={"inner": "inductor"})
    with torch.no_grad():
        assert relative(compiled(X), exact(X.double())) < 1e-6
    assert len(tensorize.report(small).fused) == 2


@here
def test_dynamic_shapes_are_fused_as_well() -> None:
    small = by_kernels(Block(swiglu, RMSNorm(24)))
    exact = tensorize.densify(small).double()
    compiled = torch.compile(small, backend="tensorize", options=EAGER, dynamic=True)
    with torch.no_grad():
        for rows in (3, 20, 50):
            x = torch.randn(rows, 24)
            assert relative(compiled(x), exact(x.double())) < 1e-6
    assert len(tensorize.report(small).fused) == 2
