"""Models compressed in every way, and all that can be had of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensorize

from .models import (
    EVERY,
    TEXT,
    Several,
    small,
    small_batches,
    small_gpt,
    small_llama,
    tokens,
    trained_gpt,
    trained_llama,
)
from .put import as_text, put, put_bits, put_model, put_rest, values


def gpt() -> None:
    """The trained GPT: of its weights alone and by data, in all formats."""
    model, ids = trained_gpt(), tokens(5)
    inputs = (ids[-1],)
    alone = tensorize.analyze(model, example_inputs=inputs, metric="frobenius", progress=False)
    put("frobenius/curve", str(alone.curve()))
    put_model("frobenius", tensorize.apply(model, alone.plan(0.5)), inputs)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    for name, formats in {
        "tt": ("dense", "tt"),
        "block": "block",
        "mixed": {"blocks.0.*": "tt", "blocks.1.*": "block", "*": ("dense", "low_rank")},
    }.items():
        found = tensorize.compile(model, 0.6, formats=formats, **compress)
        put_model(name, found, inputs)
        if name == "mixed":
            put_rest(name, found, inputs, trained_gpt())
    ranks = {"blocks.[0-2].*": "full", "blocks.3.*": 24}
    put_model("ranks", tensorize.compile(model, None, ranks=ranks, **compress), inputs)
    batches = [(each,) for each in ids[:4]]
    learned = tensorize.analyze(model, calibration=batches, progress=False)
    put("loss/analysis", str(learned))
    put("loss/notes", "\n".join(learned.notes))
    put_model("one-shot", tensorize.apply(model, learned.plan(0.4, refine=None)), inputs)
    refit = tensorize.apply(model, learned.plan(0.4, refine="refit"))
    put_model("refit", refit, inputs)
    put_rest("refit", refit, inputs, trained_gpt())


def llama() -> None:
    """The trained Llama of transformers: its own data, polished, shared, evaluated."""
    model, ids = trained_llama(), tokens(4, rows=1, length=64)
    batches = [{"input_ids": each} for each in ids[:3]]
    inputs = {"input_ids": ids[-1]}
    put_model("default", tensorize.compile(model, 0.4, progress=False), inputs)
    shared = tensorize.compile(
        model, 0.5, formats=("dense", "shared"), metric="frobenius", progress=False
    )
    put_model("shared", shared, inputs)
    put_rest("shared", shared, inputs)
    learned = tensorize.analyze(model, calibration=batches, refine="polish", progress=False)
    put("loss/analysis", str(learned))
    for limits in (0.5, tensorize.Budget(params=0.9, flops=0.6), tensorize.Budget(loss=0.1)):
        put(f"plans/{limits}", learned.plan(limits).to_json())
    polished = tensorize.apply(model, learned.plan(0.4, refine="polish"))
    put_model("polish", polished, inputs)
    measured = tensorize.evaluate(
        {"polished": polished}, model, batches[:2], time=False, progress=False
    )
    put("evaluation", str(measured))
    put("evaluation.json", as_text(measured.to_dict()))
    measured.to_html("evaluation.html")
    put("evaluation.html", Path("evaluation.html").read_text())


def minilm() -> None:
    """The sentence encoder of the demo, by its weights alone and by a few sentences."""
    from examples import demo_minilm

    model = demo_minilm.trained()
    tokenizer = demo_minilm.load_tokenizer(demo_minilm.weights_folder())
    sentences = [line.strip() for line in TEXT.splitlines() if len(line.strip()) > 60][:24]
    batches = demo_minilm.batches_of(tokenizer, sentences, 8)
    *known, inputs = ({**batch} if isinstance(batch, Mapping) else batch for batch in batches)
    alone = tensorize.compile(model, 0.6, example_inputs=inputs, metric="frobenius", progress=False)
    put_model("frobenius", alone, inputs)
    by_inputs = tensorize.compile(
        model, 0.9, calibration=sentences, tokenizer=tokenizer, metric="input",
        include="*.layer.[01].*", progress=False,
    )  # fmt: skip
    put_model("input", by_inputs, inputs, gradients=False)
    learned = tensorize.analyze(model, calibration=known, progress=False)
    put("loss/analysis", str(learned))
    put_model("refit", tensorize.apply(model, learned.plan(0.5)), inputs)


def kinds() -> None:
    """Small models with weights of many kinds, in every format."""
    ids = small_batches(1)[0]["input_ids"]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    put_compiled("gpt", small_gpt(), (ids,), EVERY)
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_hidden_layers": 1}
    put_compiled("mixtral", small("MixtralForCausalLM", **experts), {"input_ids": ids}, EVERY)
    put_compiled("several", Several().eval(), (pixels,), EVERY)
    model, batches = small_llama(), small_batches()
    options: dict[str, dict[str, Any]] = {
        "in groups": {"max_memory": "320kB"},
        "own loss": {"loss_fn": lambda outputs, batch: outputs.logits.square().mean()},
        "by inputs": {"metric": "input", "exclude": "*layers.0*"},
        "own data": {"calibration": "self", "example_inputs": batches[0]},
    }
    for name, option in options.items():
        found = tensorize.compile(model, 0.6, **{"calibration": batches, **option}, progress=False)
        put_model(name, found, batches[0])
    narrow = tensorize.compile(model.bfloat16(), 0.6, calibration=batches, progress=False)
    put_model("bfloat16", narrow, batches[0])


def others() -> None:
    """Small models of transformers, in the formats that are used unasked."""
    ids = small_batches(1)[0]["input_ids"]
    masked = {"input_ids": ids, "attention_mask": (torch.arange(12) < 9).long().expand(4, 12)}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labelled = {"input_ids": ids, "labels": ids[:, :7].contiguous()}
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    t5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    put_compiled("gpt2", small("GPT2LMHeadModel", **gpt2), {"input_ids": ids})
    put_compiled("bert", small("BertModel", max_position_embeddings=64), masked)
    image = {"image_size": 32, "patch_size": 8}
    put_compiled("vit", small("ViTForImageClassification", **image), {"pixel_values": pixels})
    put_adapted(small_llama(), {"input_ids": ids})
    put_compiled(
        "t5", small("T5ForConditionalGeneration", decoder_start_token_id=0, **t5), labelled
    )


def put_adapted(model: nn.Module, inputs: Any) -> None:
    """Adapters of peft on a compressed model."""
    import peft

    found = tensorize.compile(model, 0.6, example_inputs=inputs, metric="frobenius", progress=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    put_bits("adapted", peft.get_peft_model(found, config), inputs)


def put_compiled(name: str, model: nn.Module, inputs: Any, formats: Any = None) -> None:
    """A model compiled of its weights alone and by data, in ``formats``."""
    put(f"{name}/dense", values([*model.state_dict().items()]))
    plain = tensorize.compile(model, 0.7, example_inputs=inputs, metric="frobenius", progress=False)
    put_model(f"{name}/frobenius", plain, inputs)
    learned = tensorize.compile(
        model, 0.7, calibration=[inputs] * 4, formats=formats, progress=False
    )
    put_model(f"{name}/loss", learned, inputs)
    put_rest(f"{name}/loss", learned, inputs, model)
