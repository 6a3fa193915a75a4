"""Fused models: saved and loaded, of Hugging Face, compiled further, of any shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tensorize
from tensorize.codegen.device.triton_env import interpreting
from tensorize.ir.work import Norm, Work
from tests.kernels import here, holds_under_the_interpreter
from tests.models import CASES, relative
from tests.running.fused_graphs import (
    EAGER,
    PLAIN,
    Block,
    RMSNorm,
    X,
    by_kernels,
    mlp,
    swiglu,
    traced,
)


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    holds_under_the_interpreter(__file__)


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, marks="slow")


# --------------------------------------------------------------------------------- saved and loaded


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


# ------------------------------------------------------------------------------------ the operation


@here
def test_the_operation_passes_opcheck() -> None:
    work = Work((PLAIN.specs[0],) * 2, norm=Norm("rms", 1e-6))
    shapes = work.input_shapes(3)
    inputs = [torch.randn(shape) for shape in shapes]
    for x in (inputs[0], torch.randn(2, 3, 24), torch.randn(0, 24), torch.randn(24, 5).t()):
        torch.library.opcheck(torch.ops.tensorize.triton_fused, ([x, *inputs[1:]], work.to_text()))


# -------------------------------------------------------------------------------------- real models


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
