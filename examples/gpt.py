"""A small GPT in plain PyTorch, with trained weights in the repository.

It stands for the models that people write by hand: one packed projection for queries, keys and
values, learned positions, layer norm before each block, and an output head that has no module of
its own but uses the embedding's weight functionally. The weights were trained by
`examples/train_stdlib.py` on the sources of the Python standard library, so that the tests and
benchmarks have real trained weights without a download.

    model = load_pretrained()
    tokenizer = load_tokenizer()
    ids = torch.tensor([tokenizer.encode("def main():").ids])
    print(tokenizer.decode(model.generate(ids, 40)[0].tolist()))

Shapes: B batch, T time, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from examples import stdlib_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


DATA = Path(__file__).parent / "data"
WEIGHTS_FILE = "gpt_stdlib.safetensors"
TOKENIZER_FILE = "gpt_stdlib.tokenizer.json"
RECORD_FILE = "gpt_stdlib.json"


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT; the defaults are those of the trained weights."""

    vocabulary: int = 1024
    context: int = 256
    width: int = 192
    layers: int = 6
    heads: int = 6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")

    def to_dict(self) -> dict[str, int]:
        """The sizes by name, as the record beside the weights holds them."""
        return asdict(self)


@dataclass
class GPTOutput:
    """What a GPT returns: `logits` (B, T, V), of the token after each position."""

    logits: Tensor


# Makes the output a pytree, which torch.export needs to flatten it.
torch.export.register_dataclass(GPTOutput)


class Attention(nn.Module):
    """Causal multi-head attention with one packed projection, `nn.Linear(D, 3 D)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, time, width = x_BTD.shape
        packed = self.qkv(x_BTD).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """Two linear maps, four times as wide inside, with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x_BTD)))


class Block(nn.Module):
    """Attention, then the MLP, each behind a layer norm and added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """A decoder-only transformer whose output head is its embedding.

    Args:
        config: the sizes; the default is the model whose trained weights are in the repository.
    """

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's: N(0, 0.02²), and smaller where 2 L projections add up in the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue  # layer norms start at the identity, biases are zeroed below
            into_residual = name.endswith(("projection.weight", "contract.weight"))
            scale = 1 / math.sqrt(2 * self.config.layers) if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> GPTOutput:
        """The logits of the next token at every position.

        Args:
            ids: token ids, integers (B, T), T at most `config.context`.

        Raises:
            ValueError: the text is longer than the context.
        """
        time = ids.shape[1]
        if time > self.config.context:
            raise ValueError(f"{time} tokens do not fit a context of {self.config.context}")
        x_BTD = self.embedding(ids) + self.positions(torch.arange(time, device=ids.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        # Tied weights without a module of their own: one parameter, used twice.
        return GPTOutput(logits=F.linear(self.norm(x_BTD), self.embedding.weight))

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each text by `new_tokens` tokens; returns ids (B, T + new_tokens).

        Args:
            ids: the beginnings, (B, T).
            new_tokens: how many tokens to add.
            temperature: 0 takes the likeliest token, 1 samples from the model's prediction.
            generator: the random state of the sampling.
        """
        for _ in range(new_tokens):
            logits_BV = self(ids[:, -self.config.context :]).logits[:, -1]
            if temperature == 0.0:
                next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            else:
                probabilities = torch.softmax(logits_BV / temperature, dim=-1)
                next_B1 = torch.multinomial(probabilities, 1, generator=generator)
            ids = torch.cat([ids, next_B1], dim=1)
        return ids


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token of a batch of texts, (B, T + 1): T predictions each."""
    logits_BTV = model(ids[:, :-1]).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, *, context: int = 256, batch: int = 32) -> float:
    """Mean loss in nats a token over a long text, cut into windows without overlap.

    Perplexity is its exponential. The windows share their borders (the last token of one is the
    first input of the next), so that every token but the first is predicted exactly once.

    Args:
        model: anything that maps ids (B, T) to an object with `.logits`.
        tokens: the text, (N,). What does not fill a last window is left out.
        context: T, the length of a window.
        batch: windows per forward pass.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens do not fill one window of {context}")
    windows = tokens.unfold(0, context + 1, context)
    was_training = model.training
    model.eval()
    total = sum(next_token_loss(model, part).item() * len(part) for part in windows.split(batch))
    model.train(was_training)
    return total / len(windows)


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The ids of several texts in one row, (N,), each text followed by the end-of-text token."""
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        raise ValueError("the tokenizer has no token <|endoftext|>")
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids)


@cache
def _all_windows(split: stdlib_text.Split, context: int) -> Tensor:
    """All of a split, as token ids (windows, context); what does not fill a window is left out."""
    ids = encode(load_tokenizer(), [document.text for document in stdlib_text.documents(split)])
    return ids[: len(ids) // context * context].view(-1, context)


def windows(split: stdlib_text.Split, count: int, context: int, seed: int = 0) -> Tensor:
    """Windows drawn from all files of a split, as token ids (windows, context)."""
    found = _all_windows(split, context)
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[drawn[:count]]


def load_record(directory: Path = DATA) -> dict[str, Any]:
    """What is known about the trained weights: sizes, training, versions, losses."""
    return json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))


def load_pretrained(directory: Path = DATA) -> GPT:
    """The trained model in evaluation mode, in float32 (the file stores float16)."""
    model = GPT(GPTConfig(**load_record(directory)["config"]))
    weights = load_file(directory / WEIGHTS_FILE)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


def load_tokenizer(directory: Path = DATA) -> Tokenizer:
    """The byte-pair tokenizer that the model was trained with."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / TOKENIZER_FILE))


def main() -> None:
    """Continues the beginning of a function with the trained model."""
    model, tokenizer, record = load_pretrained(), load_tokenizer(), load_record()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, perplexity {math.exp(record['validation_loss']):.2f}\n")
    ids = torch.tensor([tokenizer.encode('def read_file(path):\n    """Return').ids])
    generator = torch.Generator().manual_seed(0)
    out = model.generate(ids, 160, temperature=0.7, generator=generator)
    print(tokenizer.decode(out[0].tolist()))


if __name__ == "__main__":
    main()
