"""Hugging Face models of every kind, compressed in every form; and a tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tensorize
from tests.marks import slow
from tests.models import CASES, Case

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def _bert_with_head() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def _distilbert_with_head() -> nn.Module:
    return hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=128, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    )


def _ibert_with_head() -> nn.Module:  # its table of ties holds a pattern
    return hf.IBertForMaskedLM(
        hf.IBertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=32,
        )
    )


def _tied_llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def _text() -> dict[str, Tensor]:
    return {"input_ids": IDS}


MODELS: dict[str, Case] = {
    **{name: CASES[name] for name in ("llama", "gpt2", "bert", "vit", "t5", "mixtral")},
    "bert with head": Case(_bert_with_head, _text, lambda y: y.logits),
    "distilbert with head": Case(_distilbert_with_head, _text, lambda y: y.logits),
    "ibert with head": Case(_ibert_with_head, _text, lambda y: y.logits),
    "tied llama": Case(_tied_llama, _text, lambda y: y.logits),
}
AUTO = {
    "llama": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
    "bert": hf.AutoModel,
    "vit": hf.AutoModelForImageClassification,
    "t5": hf.AutoModelForSeq2SeqLM,
    "mixtral": hf.AutoModelForCausalLM,
    "bert with head": hf.AutoModelForMaskedLM,
    "distilbert with head": hf.AutoModelForMaskedLM,
    "ibert with head": hf.AutoModelForMaskedLM,
    "tied llama": hf.AutoModelForCausalLM,
}
FORMS = [(name, form) for name in MODELS for form in ("low_rank", "tt")]
FORMS.remove(("mixtral", "tt"))  # stacks of experts are low rank
FORMS += [("gpt2", "block"), ("tied llama", "block")]


def forms(of: Container[str] = MODELS) -> Any:
    """Some models in every form; ``make test`` has each as low rank, and one in the others."""
    found = [(name, form) for name, form in FORMS if name in of]
    often = [pair for pair in found if pair[1] == "low_rank" or pair[0] == "gpt2"]
    given = [pair if pair in often else slow(*pair) for pair in found]
    return pytest.mark.parametrize(("name", "form"), given, ids=[" in ".join(f) for f in found])


def compress(name: str, form: str = "low_rank") -> Any:
    case = MODELS[name]
    # Every weight that can be: tied ones, experts and heads among them.
    return tensorize.compile(
        case.model(), None, example_inputs=case.batch(), ranks={"*": 4}, formats=form
    )


def same_state(loaded: nn.Module, saved: nn.Module) -> None:
    mine, theirs = loaded.state_dict(), saved.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[key].equal(theirs[key]) for key in theirs)


@functools.cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<mask>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, 128)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", mask_token="<mask>", pad_token="<pad>"
    )
