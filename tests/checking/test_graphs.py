"""Guarded models in compiled and exported graphs: the checks are nodes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.checking.guarding import guard_of
from tensorize.checking.memory import COUNT
from tests.checking.guarded_models import BATCH, data, guarded, net

FORMS = ("train", "pivoted")


@pytest.mark.parametrize(
    ("form", "dtype"), [*((f, torch.float32) for f in FORMS), ("low rank", torch.bfloat16)]
)
def test_exported_programs_count_faults(form: str, dtype: torch.dtype) -> None:
    model: Any = tensorize.guard(net(form).to(dtype), calibration=data())
    with torch.no_grad():
        want = model(BATCH)
        program = torch.export.export(model, (BATCH,))
        runs = program.module()
        assert torch.allclose(runs(BATCH), want, atol=1e-5 if dtype is torch.float32 else 1e-1)
        counts = {name: int(b) for name, b in runs.named_buffers() if name.endswith(COUNT)}
        assert len(counts) >= 4
        assert set(counts.values()) == {0}
        weight = next(p for name, p in runs.named_parameters() if name.startswith("up"))
        weight.data.view(-1)[7] += 4.0
        runs(BATCH)
        assert any(int(b) > 0 for name, b in runs.named_buffers() if name.endswith(COUNT))


def test_the_operations_of_checks_pass_opcheck() -> None:
    counts = [torch.zeros((), dtype=torch.int64)]
    torch.library.opcheck(torch.ops.tensorize.settle_faults.default, (counts, "no model"))
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    one = torch.ones(6), torch.randn(8), torch.zeros(1)
    many = [torch.ones(6, 12), torch.randn(8, 12), torch.zeros(12)]
    for given in ((x, y, *one, None), (x.bfloat16(), y.bfloat16(), *one, many)):
        limits = [1e-3, 1e-3], [1e-3, 1e-3]
        torch.library.opcheck(torch.ops.tensorize.wrong_rows.default, (*given, *limits, "none"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "low rank", "pivoted", "train", "block"])
def test_compiled_graphs_are_whole_and_tell_faults_after_the_call(form: str) -> None:
    model: Any = guarded(form)
    with torch.no_grad():
        want = model(BATCH)
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(BATCH), want, atol=1e-5)
        weight = next(p for name, p in model.named_parameters() if name.startswith("up"))
        weight.data.view(-1)[7] += 1.0
        with pytest.raises(tensorize.FaultError, match="of a compiled graph"):
            compiled(BATCH)
        assert torch.allclose(compiled(BATCH), want, atol=1e-5)  # it was mended
        weight.mul_(1.5)  # which is no fault
        assert torch.allclose(compiled(BATCH), model(BATCH), atol=1e-5)
        compiled(BATCH)
    assert len(tensorize.guard_report(model).faults) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_of_training_tells_no_fault(dtype: torch.dtype) -> None:
    model: Any = tensorize.guard(net("low rank", trains=True).to(dtype), calibration=data())
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        compiled(BATCH).square().mean().backward()
        optimizer.step()
    assert tensorize.guard_report(model).faults == ()
    guard: Any = guard_of(model)
    assert isinstance(guard.model, nn.Module)
