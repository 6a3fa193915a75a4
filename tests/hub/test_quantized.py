"""Hugging Face models whose weights are integers of a few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tensorize
from tests.hub.compressed_models import AUTO, MODELS
from tests.marks import slow
from tests.models import relative
from tests.weight.quantized_models import put


def compress(name: str, precision: Any, budget: float) -> Any:
    case = MODELS[name]
    batches = [case.batch(seed) for seed in range(3)]
    return tensorize.compile(
        case.model(), budget, calibration=batches, precision=precision, metric="input"
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("tied llama", "auto"),
        ("gpt2", "int8"),
        slow("vit", "int4"),
        slow("mixtral", ("int8", "int3")),
    ],
)
def test_it_is_saved_and_built_again(name: str, precision: Any, tmp_path: Path) -> None:
    small, case = compress(name, precision, 0.4), MODELS[name]
    report = tensorize.report(small)
    assert any(site.precision for site in report.sites)
    assert report.totals.after.bytes == report.plan.predicted.bytes
    assert report.totals.share.bytes <= 0.4
    tensorize.save(small, tmp_path / "ours")
    small.save_pretrained(tmp_path / "theirs")
    for again in (
        tensorize.load(tmp_path / "ours"),
        AUTO[name].from_pretrained(tmp_path / "ours"),
        AUTO[name].from_pretrained(tmp_path / "theirs"),
    ):
        assert torch.equal(case.output(again), case.output(small))
    half = AUTO[name].from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert relative(case.output(half), case.output(small)) < 0.03
    codes = {key: value for key, value in half.state_dict().items() if "codes" in key}
    assert codes
    assert all(not value.is_floating_point() for value in codes.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks
def test_an_adapter_stands_beside_it() -> None:
    case = MODELS["tied llama"]
    model: Any = case.model()
    for name, parameter in list(model.named_parameters()):
        if "proj" in name and parameter.dim() == 2:
            put(model, name, ("int4", 0, False))
    wanted = case.output(model)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    adapted = peft.get_peft_model(model, config)
    assert relative(case.output(adapted), wanted) < 1e-5
    adapted(**case.batch()).logits.square().sum().backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained)


def test_healing_trains_the_scales_and_the_rest() -> None:
    case = MODELS["tied llama"]
    dense, small = case.model(), compress("tied llama", "int2", 0.4)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    healing = tensorize.heal(small, dense, [case.batch(k) for k in range(12)], steps=8, train="all")
    assert healing.after <= healing.before
    after = small.state_dict()
    moved = {key for key, value in before.items() if not value.equal(after[key])}
    assert any("core_" in key for key in moved)
    assert not any("codes" in key or "zeros" in key for key in moved)
