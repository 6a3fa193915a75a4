"""Kernels where there is no GPU: told, read as text, and compiled for a target."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import tensorize
from tensorize.codegen.device import autotune, launch
from tensorize.codegen.device.triton_env import interpreting
from tests.codegen.device.compiled_nets import IDS, WORK, compiled
from tests.kernels import holds_under_the_interpreter

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_everything_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__)


@pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="kernels run here")
def test_the_first_forward_tells_both_ways_out() -> None:
    model = compiled("triton")
    with pytest.raises(tensorize.TensorizeError, match=r"GPU.*TRITON_INTERPRET=1"):
        model(IDS)


def test_kernels_of_any_compiled_model_can_be_read() -> None:
    found = tensorize.kernels(compiled("aten"))
    assert {name for name in found if name.startswith("up.")} == {
        "up.weight.forward",
        "up.weight.forward_to_512",
        "up.weight.forward_to_64",
        "up.weight.decode",
        "up.weight.forward_saved",
        "up.weight.input_gradient",
        "up.weight.core_gradients",
    }
    assert "table.weight.lookup" in found
    text = str(found["up.weight.forward"])
    assert "W (30, 24): c0 (m0, r1), c1 (r1, n1); m0=30, r1=8, n1=24." in text
    assert "bias" in text
    assert "bias" not in str(found["down.weight.forward"])
    assert repr(found["up.weight.decode"]) == "Kernel('up.weight.decode', torch.float32)"


def test_weights_that_no_kernel_computes_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 640))
    small = tensorize.compile(
        model,
        None,
        example_inputs=(torch.randn(1, 8, 6, 6),),
        formats="low_rank",
        ranks={"0.weight": 4, "2.weight": "full"},
        backend="triton",
    )
    assert not any(name.startswith("0.") for name in tensorize.kernels(small))
    said = {site.name: site.runs_by for site in tensorize.report(small).sites}
    assert [(by.winner, by.why) for by in said["0.weight"]] == [
        ("library", "kernels compute no conv2d")
    ]
    assert [(by.first, by.last, by.winner) for by in said["2.weight"]] == [(1, None, "kernels")]
    high = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    small = tensorize.compile(
        high, None, example_inputs=(torch.randn(1, 600),), ranks={"*": 560}, backend="triton"
    )
    (by, rest) = tensorize.report(small).sites[0].runs_by
    assert (by.first, by.last, by.winner) == (1, 16, "kernels")
    assert (rest.first, rest.last, rest.winner) == (17, None, "library")


def test_a_kernel_is_compiled_for_a_target() -> None:
    if interpreting():
        pytest.skip("the interpreter does not compile")
    made = tensorize.kernels(compiled("aten"))["up.weight.forward"].compile("hip:gfx90a")
    assert (made.target, made.spills) == ("hip:gfx90a", 0)
    assert "amdgcn" in made.asm


def test_the_first_call_of_a_kernel_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_called", set())
    source = autotune.source(WORK, torch.float32, 1, "cpu")
    with caplog.at_level(logging.INFO, logger="tensorize"):
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            launch._tell_of_first_call(source, dtype)
    told = [record.getMessage() for record in caplog.records]
    assert sum("tensorize calibrate --model" in line for line in told) == 1
    assert sum("first call of kernel decode" in line for line in told) == 2


def test_a_backend_that_is_unknown_is_refused() -> None:
    with pytest.raises(tensorize.TensorizeError, match="'aten', 'triton'"):
        compiled("cuda")
