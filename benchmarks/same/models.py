"""The models and the data that are compressed: trained ones, and small ones of many kinds."""

from __future__ import annotations

import argparse
import ast
import inspect
from typing import Any

import torch
from torch import Tensor, nn

EVERY = ("dense", "low_rank", "shared", "tt", "block")
TEXT = inspect.getsource(argparse) + inspect.getsource(ast)


def trained_gpt() -> nn.Module:
    from examples import gpt

    return gpt.load_pretrained()


def trained_llama() -> nn.Module:
    from examples import llama

    return llama.load_pretrained()


def tokens(batches: int, rows: int = 2, length: int = 96) -> Tensor:
    """Text as tokens of the examples' models, (batches, rows, length)."""
    from examples import gpt

    ids = gpt.encode(gpt.load_tokenizer(), [TEXT])
    return ids[: batches * rows * length].view(batches, rows, length)


def fading(model: nn.Module) -> nn.Module:
    """The model with weights whose spectra fall, as those of trained ones do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((u * s * torch.logspace(0, -3, len(s))) @ v)
    return model.eval()


def small_gpt() -> nn.Module:
    from examples.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    return fading(GPT(GPTConfig(vocabulary=128, context=32, width=48, layers=2, heads=4)))


def small(kind: str, **sizes: Any) -> nn.Module:
    """A small model of transformers, by what its class is called."""
    import transformers as hf

    usual = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = getattr(hf, kind)
    torch.manual_seed(0)
    return fading(model(model.config_class(**{**usual, **sizes})))


def small_llama(layers: int = 2) -> nn.Module:
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": False, "num_hidden_layers": layers}
    return small("LlamaForCausalLM", **sizes)


def small_batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 128, (4, 12), generator=generator)} for _ in range(count)
    ]


class Several(nn.Module):
    """Weights of other kinds: convolved, recurrent, of attention, by einsum, bare."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved = nn.Conv2d(3, 24, 4, stride=4)
        self.recurrent = nn.LSTM(24, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.bare = nn.Parameter(torch.randn(24, 48) / 5)
        self.mixed = nn.Parameter(torch.randn(3, 48, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolved(x).flatten(2).transpose(1, 2)
        x = x + self.recurrent(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.einsum("btn,end->betd", torch.relu(x @ self.bare), self.mixed)
