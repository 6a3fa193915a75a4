"""Compiled Hugging Face models in the trainer, in pipelines and with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tensorize
from tests.hub.compressed_models import AUTO, IDS, MODELS, compress, same_state, tokenizer
from tests.marks import slow
from tests.models import relative


@pytest.mark.parametrize("name", ["gpt2", slow("bert with head"), slow("mixtral")])
def test_trainer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    result = compress(name)
    before = {key: value.clone() for key, value in result.state_dict().items()}
    data = [{"input_ids": IDS[k % 2], "labels": IDS[k % 2]} for k in range(8)]

    if name == "gpt2":
        result.activation_checkpointing_enable()

    def train(steps: int, **options: Any) -> hf.Trainer:
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(result, arguments, train_dataset=data)
        trainer.train(**options)
        return trainer

    train(3)
    after = result.state_dict()
    trained = [k for k in after if ("core" in k or "first" in k) and not k.endswith("order")]
    assert not any(after[k].equal(before[k]) for k in trained)
    checkpoint = tmp_path / "checkpoint-3"
    same_state(AUTO[name].from_pretrained(checkpoint), result)
    assert train(4, resume_from_checkpoint=str(checkpoint)).state.global_step == 4


@pytest.mark.parametrize(
    ("task", "name", "text", "options"),
    [
        ("text-generation", "gpt2", "w3 w4 w5", {"max_new_tokens": 5, "do_sample": False}),
        ("fill-mask", "bert with head", "w3 <mask> w5", {"top_k": 3}),
        ("feature-extraction", "bert", "w3 w4", {}),
    ],
)
def test_pipeline(task: Any, name: str, text: str, options: dict[str, Any]) -> None:
    result = compress(name)

    def run(model: Any) -> Any:
        return hf.pipeline(task, model=model, tokenizer=tokenizer())(text, **options)

    got, want = run(result), run(tensorize.densify(result))
    if task == "feature-extraction":
        assert relative(torch.tensor(got), torch.tensor(want)) < 1e-5
    elif task == "fill-mask":
        assert [guess["token"] for guess in got] == [guess["token"] for guess in want]
    else:
        assert got == want


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks
def test_peft_by_the_default_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for name in ("llama", "bert"):
        case, result = MODELS[name], compress(name)
        tuned = peft.get_peft_model(result, peft.LoraConfig(r=2, init_lora_weights=False))
        assert any("lora_A" in key for key, p in tuned.named_parameters() if p.requires_grad)
        tuned.save_pretrained(tmp_path / name)
        again = peft.PeftModel.from_pretrained(compress(name), tmp_path / name)
        assert case.output(again).equal(case.output(tuned))
