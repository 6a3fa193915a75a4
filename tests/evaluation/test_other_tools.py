"""Evaluation beside other people's tools: torchao and lm-eval."""

from __future__ import annotations

import sys

import pytest
import torch

from tensorize.base.errors import TensorizeError
from tensorize.evaluation import meter
from tests.evaluation.measured_models import llama, measured, padded
from tests.hub.compressed_models import tokenizer
from tests.training.healed_models import values


def test_quantizing_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = llama()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(TensorizeError, match="pip install torchao"):
        measured(small, dense, padded(), quantize="int8")
    with pytest.raises(TensorizeError, match="'int3' is not one of"):
        measured(small, dense, padded(), quantize="int3")


@pytest.mark.slow  # `make test-all` installs torchao
def test_quantized_factors_are_one_more_row() -> None:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    dense, small = llama()
    before = values(small)
    found = measured({"small": small}, dense, padded(), quantize=("int8", "int4"))
    names = [f.name for f in found.models]
    assert names == ["small", "dense, int8", "small, int8", "dense, int4", "small, int4"]
    for way in ("int8", "int4"):
        assert found[f"small, {way}"].bytes < found["small"].bytes
        assert found[f"dense, {way}"].quality.distance > 0
    # Errors add up: each alone costs less than both together.
    both = found["small, int4"].quality.distance
    assert both > max(found["small"].quality.distance, found["dense, int4"].quality.distance)
    assert found["small, int8"].quality.distance < both
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.slow
def test_lm_eval_takes_a_compressed_model_as_it_is() -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    instance = pytest.importorskip("lm_eval.api.instance")
    _, small = llama()
    words = tokenizer()
    words.eos_token = "<pad>"
    answering = harness.HFLM(pretrained=small, tokenizer=words, device="cpu", batch_size=2)
    asked = [("w5 w6 w7", " w8 w9"), ("w10 w11", " w12")]
    requests = [
        instance.Instance("loglikelihood", {}, arguments, k) for k, arguments in enumerate(asked)
    ]
    answers = answering.loglikelihood(requests, disable_tqdm=True)
    for (context, rest), (likelihood, _) in zip(asked, answers, strict=True):
        ids = torch.tensor([words.encode(context + rest)])
        known = len(words.encode(context))
        with torch.no_grad():
            logits = small(ids).logits.log_softmax(-1)[0, known - 1 : -1]
        want = logits.gather(1, ids[0, known:, None]).sum()
        assert likelihood == pytest.approx(float(want), rel=1e-3)


def test_neighbours_of_few_samples() -> None:
    a = torch.randn(4, 8)
    assert meter.neighbour_agreement(a, a) == 1.0
    assert meter.neighbour_agreement(a, -a) == 1.0  # all three others, in any order
