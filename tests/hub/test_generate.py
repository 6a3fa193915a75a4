"""Compiled Hugging Face models generate token for token, and in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tensorize
from tests.hub.compressed_models import FORMS, IDS, MODELS, compress, forms
from tests.models import CASES, relative

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@forms(("llama", "gpt2", "t5", "mixtral"))
def test_generate_token_for_token(name: str, form: str) -> None:
    result = compress(name, form)
    plain = tensorize.densify(result)
    mask = torch.ones_like(IDS)
    for way, options in WAYS.items():
        if name == "t5" and way == "static cache":
            continue  # transformers refuses it for encoder-decoders
        got = result.generate(IDS, attention_mask=mask, **GREEDY, **options)
        want = plain.generate(IDS, attention_mask=mask, **GREEDY, **options)
        assert got.equal(want), way
        assert got.shape[1] > 1


def test_continuous_batching_gives_the_same_tokens() -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    result: Any = compress("llama", "low_rank")
    want = result.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)[:, IDS.shape[1] :]
    # Without limits transformers makes its tables as large as the free memory allows.
    limits = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = result.generate_batch(
        inputs=IDS.tolist(),
        generation_config=GenerationConfig(eos_token_id=10**6, **GREEDY),
        continuous_batching_config=limits,
        warmup=False,
    )
    assert sorted(each.generated_tokens for each in found.values()) == sorted(want.tolist())


COMPILED = [(n, f) for n, f in FORMS if n in CASES and (f == "low_rank" or n == "gpt2")]


@pytest.mark.parametrize(("name", "form"), COMPILED, ids=[" in ".join(f) for f in COMPILED])
@pytest.mark.slow
def test_torch_compile_makes_one_graph_for_all_shapes(name: str, form: str) -> None:
    case, result = MODELS[name], compress(name, form)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(result, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((2, 9), (3, 11), (4, 7)):
        ids = torch.randint(3, 128, (batch, length))
        given = {"t5": {"input_ids": ids, "labels": ids[:, 1:].contiguous()}}.get(
            name, {"input_ids": ids}
        )
        if name == "vit":
            given = {"pixel_values": torch.randn(batch, 3, 32, 32)}
        assert relative(case.output(compiled, given), case.output(result, given)) < 1e-5
    # Trains change their order at two batches at most, the same ones in all weights.
    assert counter.frame_count <= (1 if form == "low_rank" else 3)
