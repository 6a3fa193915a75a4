"""The models that the tests compile: small, seeded, of real architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from examples.gpt import GPT, GPTConfig


class MLP(nn.Module):
    """A linear layer, a functional one on a bare parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 96)
        self.middle = nn.Parameter(torch.randn(80, 96) / 10)
        self.head = nn.Linear(80, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(F.relu(self.first(x)), self.middle)))


@dataclass(frozen=True)
class Case:
    """A model to build, inputs for it, and where its output to compare is."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    read: Callable[[Any], Tensor]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self, seed: int = 1) -> Any:
        torch.manual_seed(seed)
        return self.inputs()

    def output(self, model: nn.Module, batch: Any = None) -> Tensor:
        batch = self.batch() if batch is None else batch
        with torch.no_grad():
            if isinstance(batch, Mapping):
                return self.read(model(**batch))
            return self.read(model(*batch))


def _ids(batch: int = 2, time: int = 9) -> Tensor:
    return torch.randint(3, 128, (batch, time))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _logits(output: Any) -> Tensor:
    return output.logits


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _bert() -> nn.Module:
    return hf.BertModel(
        hf.BertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


CASES: dict[str, Case] = {
    "mlp": Case(MLP, lambda: (torch.randn(16, 48),), lambda y: y),
    "gpt": Case(
        lambda: GPT(GPTConfig(vocabulary=128, context=32, width=32, layers=2, heads=4)),
        lambda: (_ids(),),
        _logits,
    ),
    "llama": Case(_llama, _text, _logits),
    "gpt2": Case(_gpt2, _text, _logits),
    "bert": Case(_bert, _padded, _hidden),
    "vit": Case(_vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, _logits),
    "t5": Case(_t5, lambda: {"input_ids": _ids(), "labels": _ids(2, 7)}, _logits),
    "mixtral": Case(_mixtral, _text, _logits),
}


def plain_llama(width: int, hidden: int, vocabulary: int) -> hf.LlamaForCausalLM:
    """Two layers with four heads and as many for keys and values, and a head of its own."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
    )
    return hf.LlamaForCausalLM(config)


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def parameters(model: nn.Module) -> int:
    """Every parameter once."""
    return sum(p.numel() for p in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """Those of every parameter, and of the orders, codes and zero points beside them."""
    known = ("order", "codes_", "zeros_")
    beside = [b for name, b in model.named_buffers() if name.split(".")[-1].startswith(known)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *beside))
