"""Small models in all the forms that are served, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import tensorize
from tensorize.formats.quantized import inputs_in_full

WORDS, TOKENS, PROMPTS, LENGTH = 512, 32, 8, 24


def llama(**options: Any) -> Any:
    sizes = {
        "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **options}))


def qwen2(**options: Any) -> Any:
    sizes = {
        "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**sizes, **options}))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def gpt2(**options: Any) -> Any:
    sizes = {
        "vocab_size": WORDS, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**sizes, **options}))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.2)
    return model


_EXPERTS = {
    "vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}  # fmt: skip


def qwen3_moe(**options: Any) -> Any:
    sizes = {**_EXPERTS, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 96}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**sizes, **options}))


def mixtral(**options: Any) -> Any:
    sizes = {**_EXPERTS, "num_local_experts": 4, "intermediate_size": 128}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**sizes, **options}))


@dataclass(frozen=True)
class Case:
    """A model, and how it is compressed."""

    build: Callable[..., Any]
    sizes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    pivoted: bool | None = None


CASES: dict[str, Case] = {
    "plain": Case(llama, options={"ranks": {"*": 40}, "formats": "low_rank"}, pivoted=False),
    "pivoted": Case(llama, options={"ranks": {"*": 40}, "formats": "low_rank"}, pivoted=True),
    "shared": Case(llama, options={"budget": 0.5, "formats": "shared"}),
    "mixed": Case(
        llama,
        options={"ranks": {"*": 40}, "formats": "low_rank", "exclude": ["*k_proj*", "*up_proj*"]},
    ),
    "tied": Case(
        llama,
        sizes={"tie_word_embeddings": True},
        options={"ranks": {"*": 40}, "formats": "low_rank"},
    ),
    "bias": Case(qwen2, options={"ranks": {"*": 40}, "formats": "low_rank"}),
    "conv1d": Case(gpt2, options={"ranks": {"*": 64}, "formats": "low_rank"}, pivoted=True),
    "train": Case(llama, options={"budget": 0.6, "formats": "tt"}),
    "int8": Case(llama, options={"budget": 0.2, "precision": "int8"}),
    "experts": Case(qwen3_moe, options={"ranks": {"*": 40}, "formats": "low_rank"}),
    "some experts": Case(
        mixtral,
        options={"ranks": {"*": 40}, "formats": "low_rank", "exclude": ["*.0.*down_proj"]},
    ),
    "int4": Case(gpt2, options={"budget": 0.12, "precision": "int4"}),
}


def dense(case: Case) -> Any:
    """The model of a case, as it was."""
    torch.manual_seed(0)
    return case.build(**case.sizes).eval()


def saved(case: Case, directory: Path) -> Path:
    """The folder of a case, written."""
    model = dense(case)
    given = {"budget": None, "metric": "frobenius", "refine": None, **case.options}
    ids = torch.randint(0, WORDS, (2, 16))
    small = tensorize.compile(model, example_inputs={"input_ids": ids}, progress=False, **given)
    if case.pivoted is not None:
        change = tensorize.weight.pivoted if case.pivoted else tensorize.weight.plain
        change(small)
    tensorize.save(small, directory)
    return directory


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, WORDS, (PROMPTS, LENGTH), generator=generator).tolist()


@torch.inference_mode()
def expected(directory: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of transformers and their log-probabilities, from the same folder."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(prompts())
    with inputs_in_full():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[10**6],
        )
        return made[:, LENGTH:].tolist(), _of_tokens(model, made).tolist()


@torch.inference_mode()
def log_probabilities(directory: Path, tokens: list[list[int]], dtype: torch.dtype) -> Tensor:
    """Those that transformers gives to tokens after the prompts; as it multiplies usually."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return _of_tokens(model, torch.cat([torch.tensor(prompts()), torch.tensor(tokens)], 1))


def _of_tokens(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, LENGTH - 1 : -1].float().log_softmax(-1)
    return logits.gather(-1, ids[:, LENGTH:, None])[..., 0]


@torch.inference_mode()
def with_adapter(directory: Path, tokens: list[list[int]], adapter: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of tokens where B A is added to the dense form of each weight."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = tensorize.densify(model)
    for key, left in adapter.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            right = adapter[key.replace("lora_B", "lora_A")]
            model.get_parameter(f"{name}.weight").add_(left @ right)
    return _of_tokens(model, torch.cat([torch.tensor(prompts()), torch.tensor(tokens)], 1))
