"""The result of ``compile`` is compiled and exported like any other module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tensorize
from tests.api.mixed_model import (
    IDS,
    LENGTH,
    close,
    dense,
    gradients,
    ignore,
    loss,
    scores,
    small,
    words,
)
from tests.models import parameters, relative

SHAPES = ((3, 7), (4, 9), (2, 11), (5, 5))

OWN_DEPRECATIONS = [
    ignore("ignore:`torch.jit.script:DeprecationWarning"),
    ignore("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def torch_warns_of_itself(test: Callable) -> Callable:
    for mark in OWN_DEPRECATIONS:
        test = mark(test)
    return test


def recompiles(model: nn.Module, backend: str, dynamic: bool | None) -> list[int]:
    """How often other shapes than the first are compiled for again: in inference, in training."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    eager = copy.deepcopy(model)
    seen: list[int] = []
    for shape in SHAPES:
        ids = words(*shape)
        assert relative(scores(compiled, ids), scores(eager, ids)) < 1e-5
        seen.append(counter.frame_count)
    for shape in SHAPES:
        model.zero_grad()
        loss(compiled, words(*shape)).backward()
        seen.append(counter.frame_count)
    got = {name: p.grad for name, p in model.named_parameters()}
    close(got, gradients(eager, words(*SHAPES[-1])))  # type: ignore[arg-type]
    last = len(SHAPES) - 1
    assert seen[0] > 0
    return [seen[last] - seen[0], seen[-1] - seen[last + 1]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.slow
def test_compile_once_for_all_shapes(backend: str) -> None:
    assert recompiles(small(), backend, dynamic=True) == [0, 0]


def test_compile_no_more_often_than_the_dense_form() -> None:
    want = recompiles(tensorize.densify(small()), "eager", None)
    assert recompiles(small(), "eager", None) == want


@pytest.mark.slow  # it compiles C++
@torch_warns_of_itself
def test_inductor() -> None:
    torch._dynamo.reset()
    result, eager = small(), small()
    compiled: Any = torch.compile(result, fullgraph=True, dynamic=True)
    for shape in SHAPES[:2]:
        assert relative(scores(compiled, words(*shape)), scores(eager, words(*shape))) < 1e-5
    loss(compiled).backward()
    got = {name: p.grad for name, p in result.named_parameters()}
    close(got, gradients(eager))  # type: ignore[arg-type]


def test_export() -> None:
    result = small()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=LENGTH)
    for strict in (False, True):
        program = torch.export.export(
            result, (IDS,), dynamic_shapes={"ids": (batch, length)}, strict=strict
        )
        assert program.state_dict.keys() == result.state_dict().keys()
        assert not program.constants
        for shape in SHAPES:
            ids = words(*shape)
            assert relative(scores(program.module(), ids), scores(result, ids)) < 1e-6


@pytest.mark.slow  # it compiles C++
@torch_warns_of_itself
def test_aot_inductor(tmp_path: Path) -> None:
    result = small()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        result, (IDS,), dynamic_shapes={"ids": (batch, torch.export.Dim.STATIC)}
    )
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for size in (3, 5):
        assert relative(scores(loaded, words(size)), scores(result, words(size))) < 1e-5


@torch_warns_of_itself
def test_onnx_runtime_gives_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result = small()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=LENGTH)
    program = torch.onnx.export(
        result, (IDS,), dynamic_shapes={"ids": (batch, length)}, dynamo=True, verbose=False
    )
    assert program is not None
    stored = sum(math.prod(v.shape) for v in program.model.graph.initializers.values())
    assert stored < 1.3 * parameters(result) < 0.5 * parameters(dense())
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        (got,) = session.run(None, {"ids": words(*shape).numpy()})
        assert relative(torch.from_numpy(got), scores(result, words(*shape))) < 1e-5
