"""A checkpoint compressed layer by layer on calibration data: the bits of a compile of it whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tensorize
from tests.api.checkpoints import assert_same, llama, saved

pytestmark = pytest.mark.usefixtures("a_short_curve")


def gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    return hf.GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "gpt2": gpt2,
}


def data(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(96, (3, 16), generator=generator)} for _ in range(count)]


def whole(directory: Path, out: Path, **options: Any) -> Path:
    """What is to be matched: the model loaded whole, compiled and saved."""
    config = hf.AutoConfig.from_pretrained(directory)
    model = getattr(hf, config.architectures[0]).from_pretrained(directory, dtype="auto")
    tensorize.save(tensorize.compile(model, 0.5, refine=None, **options), out)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_writes_what_compile_and_save_write(name: str, tmp_path: Path) -> None:
    dense = saved(MODELS[name](), tmp_path / "dense")
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5, calibration=data())
    assert report.factorized
    assert_same(tmp_path / "streamed", whole(dense, tmp_path / "whole", calibration=data()))
    assert not (tmp_path / "streamed" / ".tensorize-stream").exists()
