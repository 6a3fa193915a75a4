"""Compiled Hugging Face models in other precisions, on device maps and offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from torch import nn

import tensorize
from tensorize.base.errors import CaptureError
from tests.hub.compressed_models import IDS, MODELS, compress, same_state
from tests.marks import slow
from tests.models import CASES, relative


@pytest.mark.parametrize("form", ["low_rank", slow("tt")])
def test_layers_kept_in_float32(form: str) -> None:
    """T5 in half precision casts what goes into the layers that stay in float32."""
    case = MODELS["t5"]
    model = case.model().half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    result = tensorize.compile(
        model, None, example_inputs=case.batch(), ranks={"*": 4}, formats=form
    )
    got, want = case.output(result), case.output(tensorize.densify(result))
    assert got.dtype == want.dtype
    assert relative(got.float(), want.float()) < 0.02


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_models_on_a_device_map(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    CASES["gpt2"].model().save_pretrained(tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=device_map)
    result = tensorize.compile(model, 0.5)
    plain = tensorize.densify(result)
    assert relative(result(IDS).logits.detach(), plain(IDS).logits.detach()) < 1e-5
    tensorize.save(result, tmp_path / "small")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=device_map)
    same_state(loaded, result)


def test_hooks_of_accelerate_stay() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = CASES["llama"].model()
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")

    def hooked(module: nn.Module) -> set[str]:
        return {name for name, part in module.named_modules() if hasattr(part, "_hf_hook")}

    result: Any = tensorize.compile(model, 0.5)
    assert hooked(model) <= hooked(result)
    want = tensorize.compile(CASES["llama"].model(), 0.5)
    assert result(IDS).logits.equal(want(IDS).logits)
    plain = tensorize.densify(result)
    assert relative(plain(IDS).logits.detach(), want(IDS).logits.detach()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*meta device.*offloaded")
def test_offloaded_models_are_refused_and_results_can_be_offloaded(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(CASES["llama"].model(), execution_device="cpu")
    with pytest.raises(CaptureError, match=r"meta device(.|\n)*compiled before it is offloaded"):
        tensorize.compile(model, 0.5)
    for name in ("gpt2", "mixtral"):  # tables and experts have lazy weights
        result = compress(name)
        want = result(IDS).logits.detach()
        accelerate.cpu_offload(result, execution_device="cpu")
        assert all(p.is_meta for p in result.parameters())
        assert result(IDS).logits.equal(want)


def test_from_pretrained_offloads_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path / "small")
    parts = ("wte", "wpe", "h.0", "h.1", "ln_f")
    places = {f"transformer.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places["transformer.h.1"] = "disk"
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert relative(loaded(IDS).logits.detach(), saved(IDS).logits.detach()) < 1e-5
