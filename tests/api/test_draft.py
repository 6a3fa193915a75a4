"""A draft: how often its tokens are accepted follows from its KL, and its text changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from examples import gpt, llama, stdlib_text
from tensorize.api import draft as drafts
from tensorize.api.draft import Speculation, acceptance, best_speculation, tokens_a_call


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_acceptance_follows_from_the_kl(noise: float) -> None:
    """Of logits with Gaussian noise: the share of accepted tokens is 1 - TV."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 500, generator=generator, dtype=torch.float64)
    other = logits + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    p, q = logits.softmax(-1), other.softmax(-1)
    kl = float((p * (p.log() - q.log())).sum(-1).mean())
    accepted = float(1 - (p - q).abs().sum(-1).mean() / 2)
    assert acceptance(kl) == pytest.approx(accepted, abs=0.02)


def test_acceptance_has_ends() -> None:
    assert acceptance(0.0) == acceptance(-1e-9) == 1.0
    assert acceptance(math.pi) == acceptance(100.0) == 0.0


def test_a_call_gives_what_is_accepted_and_one_more() -> None:
    assert tokens_a_call(1.0, 4) == 5
    assert tokens_a_call(0.0, 4) == 1
    assert tokens_a_call(0.5, 2) == 1.75


def test_a_better_draft_writes_more_at_a_time() -> None:
    dense = [10.0 + k for k in range(9)]
    rough, good = (best_speculation(kl, 2.0, dense) for kl in (1.0, 0.01))
    assert rough.tokens < good.tokens
    assert 1 < rough.speedup < good.speedup
    assert best_speculation(0.1, 10.0, dense).speedup < 1  # it is as slow as the model itself


# ------------------------------------------------------------------------------ on a trained model


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    tokenizer = gpt.load_tokenizer()
    return gpt.encode(tokenizer, [d.text for d in stdlib_text.documents("train")[:4]])


@pytest.fixture(scope="module")
def batches(text: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in text.unfold(0, 64, 64)[:8].split(4)]


def test_the_text_is_the_dense_models_own(
    text: torch.Tensor, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it paid: in so small a model nothing does.
    paying = lambda kl, draft, dense: Speculation(acceptance(kl), 3, 2 - kl)  # noqa: E731
    monkeypatch.setattr(drafts, "best_speculation", paying)
    model = llama.load_pretrained()
    small: Any = tensorize.draft(model, calibration=batches, budgets=(0.3, 0.6), refine=None)
    assert "as a draft: " in tensorize.report(small).notes[-1]
    assert small.generation_config.num_assistant_tokens == 3
    assert model.generation_config is not small.generation_config
    prompt = {"input_ids": text[None, -48:-16], "attention_mask": torch.ones(1, 32).long()}
    how = {"max_new_tokens": 16, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    alone = model.generate(**prompt, **how)
    assert torch.equal(model.generate(**prompt, **how, assistant_model=small), alone)


def test_where_no_draft_pays_it_is_said(batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_call", lambda model, analysis: 1e6)  # all but matmuls
    with pytest.raises(tensorize.BudgetError, match="no draft is predicted to pay"):
        tensorize.draft(llama.load_pretrained(), calibration=batches, budgets=(0.5,), refine=None)


def test_only_decoders_have_drafts() -> None:
    with pytest.raises(tensorize.CaptureError, match="does not generate text"):
        tensorize.draft(nn.Linear(4, 4), calibration=[torch.ones(1, 4)])
