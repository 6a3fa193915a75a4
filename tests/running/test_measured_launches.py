"""Launches are chosen by measurement, and the report says what runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tensorize
from tensorize import TTSpec
from tensorize.codegen.device import autotune, launch, reference
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton import tiles
from tensorize.ir.machine import Machine
from tensorize.ir.work import Epilogue, Norm, Work, work_of
from tensorize.running.in_use import use_kernels
from tests.kernels import here, holds_under_the_interpreter
from tests.models import relative
from tests.running.fused_graphs import PLAIN, Block, RMSNorm, X, by_kernels, mlp, swiglu, traced


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    holds_under_the_interpreter(__file__)


@pytest.fixture
def measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's cache of choices, empty, as if it were a GPU's."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "known", lambda device: True)
    monkeypatch.setattr(Machine, "reads_orders", False)
    autotune.forget()
    yield
    autotune.forget()


def record(work: Work, rows: int, ratio: float, family: str = "decode") -> None:
    cut = tiles.default_decode(work, torch.float32) if family == "decode" else tiles.Tiles(16, 16)
    choice = autotune.Choice(family, cut, ratio)
    autotune.keep(work, torch.float32, autotune.bucket(rows), "cpu", choice)


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
    assert any(
        "rms norm" in text and "silu(x W_0^T) * (x W_1^T)" in text for text in fused.values()
    )
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
