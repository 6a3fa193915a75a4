"""Commands, run here or in a process of their own, and the models that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from tensorize.cli import app

NET = """
    import torch
    from torch import nn

    print("a module that talks")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(32, 48)
            self.down = nn.Linear(48, 12)

        def forward(self, x, shift=None):
            y = self.down(torch.relu(self.up(x)))
            return y if shift is None else y + shift

    def make():
        torch.manual_seed(0)
        return Net()

    def with_inputs():
        return make(), (torch.zeros(3, 32),)

    def attribute():
        return make()

    attribute.example_inputs = lambda: {"x": torch.zeros(3, 32)}

    def nothing():
        return 3

    def broken():
        raise RuntimeError("no such weights")

    def interrupted():
        import os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell says so
        os.kill(os.getpid(), signal.SIGINT)
        return make()

    instance = make()
"""
TEXT = "\n\n".join(
    f"the cat number {n} sat on the mat and\nlooked at dog {n + 1}" for n in range(12)
)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tiny_llama(directory: Path, *, tokenizer: bool = True, eos: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = sorted({"<unk>", "<s>", *TEXT.split()})
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(words), max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    if tokenizer:
        raw = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", eos_token=eos, model_max_length=32
        ).save_pretrained(directory)
    return model
