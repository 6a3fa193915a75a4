"""Curves learned layer by layer: the bits of those that are learned of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from tensorize.passes.stages import Learned
from tests.passes.layers.models import batches_for, gpt2, in_layers, in_memory, llama, tokens

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": llama,
    "tied llama in bfloat16": lambda: llama(tie_word_embeddings=True).to(torch.bfloat16),
    "gpt2": gpt2,
}


def assert_same(one: Learned, other: Learned) -> None:
    assert list(one.spectra) == list(other.spectra)
    for name, curve in one.spectra.items():
        twin = other.spectra[name]
        assert torch.equal(curve.distortion, twin.distortion), name
        assert curve.in_nats == twin.in_nats
        assert len(curve.metrics) == len(twin.metrics), name
        for metric, wanted in zip(curve.metrics, twin.metrics, strict=True):
            for mine, theirs in ((metric.left, wanted.left), (metric.right, wanted.right)):
                assert (mine is None) == (theirs is None), name
                assert mine is None or theirs is None or torch.equal(mine, theirs), name
        if curve.shared is None or twin.shared is None:
            assert curve.shared is twin.shared
        else:
            assert torch.equal(curve.shared.distortion, twin.shared.distortion)
    assert one.few == other.few
    assert one.unforeseen == other.unforeseen
    assert one.notes == other.notes


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("llama", 0),
        ("tied llama in bfloat16", 5),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("gpt2", 0), ("gpt2", 5))),
    ],
)
def test_curves_are_those_of_the_whole_model(name: str, hidden: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    batches = batches_for(model, tokens(2, hidden=hidden))
    assert_same(in_layers(model, batches, tmp_path), in_memory(model, batches))


@pytest.mark.parametrize("hidden", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_of_inputs_alone(hidden: int, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    batches = batches_for(model, tokens(2, hidden=hidden))
    assert_same(in_layers(model, batches, tmp_path, "input"), in_memory(model, batches, "input"))
