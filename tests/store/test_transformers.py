"""Saved models of transformers: built by name, with the configuration of the dense one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensorize.base.errors import CheckpointError
from tensorize.ir.spec import TTSpec
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST
from tensorize.store.save import save
from tensorize.weight.low_rank import LowRankLinear
from tests.store.saved_models import (
    IDS,
    Allocations,
    assert_same_model,
    attach_report,
    compressed_gpt2,
    compressed_mlp,
    edit_manifest,
    factorize,
    gpt2,
    output,
    same_bits,
    weights_file,
)

# ------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_gpt2_without_a_model(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    save(saved, tmp_path)
    state = torch.random.get_rng_state()
    with Allocations() as seen:
        loaded = load(tmp_path)
    assert torch.random.get_rng_state().equal(state)
    assert type(loaded) is type(saved)
    assert_same_model(loaded, saved)
    largest = max(p.numel() for p in saved.parameters())
    assert seen.largest == 4 * largest < 4 * 99 * 32
    ids = IDS[:, :5]
    assert loaded.generate(ids, max_new_tokens=8, do_sample=False).equal(  # type: ignore[operator]
        saved.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    )
    assert_same_model(load(tmp_path, gpt2(seed=5)), saved)
    attention = dict(loaded.named_modules())["transformer.h.0.attn.c_attn"]
    assert isinstance(attention, LowRankLinear)
    assert attention.stored_transposed


@pytest.mark.usefixtures("offline")
def test_a_dense_checkpoint_keeps_its_configuration(tmp_path: Path) -> None:
    dense = gpt2()
    dense.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    small = compressed_gpt2()
    with pytest.raises(CheckpointError, match=r"holds a dense checkpoint \(model\.safetensors\)"):
        save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(small, tmp_path / "small")
    save(small, tmp_path / "small")  # its own place


@pytest.mark.usefixtures("offline")
def test_config_files_are_for_other_tools(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    save(compressed_gpt2(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["GPT2LMHeadModel"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    save(compressed_gpt2(seed=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "generation_config.json", weights_file(tmp_path).name,
        MANIFEST, "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("cast", ["built", "moved"])
def test_bfloat16_with_rotary_tables(cast: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=99, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    if cast == "built":  # tables in float32
        saved = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    else:  # tables in bfloat16
        saved = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    factorize(saved, ["lm_head.weight"], (99, 1), (1, 32), 5)
    factorize(saved, ["model.layers.1.mlp.up_proj.weight"], (6, 8), (4, 8), 3)
    save(attach_report(saved), tmp_path)
    loaded = load(tmp_path)
    assert_same_model(loaded, saved)
    theirs = dict(saved.named_buffers())
    assert all(same_bits(b, theirs[name]) for name, b in loaded.named_buffers())
    assert loaded.config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.usefixtures("offline")
def test_infinity_in_a_config(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    saved.config.limits = [0.0, math.inf]  # type: ignore[union-attr]
    save(saved, tmp_path)
    assert load(tmp_path).config.limits == [0.0, math.inf]  # type: ignore[union-attr]


@pytest.mark.usefixtures("offline")
def test_new_process(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    save(saved, tmp_path)
    script = (
        "import sys, hashlib, torch, tensorize\n"
        "from tensorize.store.load import load\n"
        "model = load(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.arange(30).reshape(2, 15)).logits\n"
        "print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = hashlib.sha256(output(saved).numpy().tobytes()).hexdigest()
    assert done.stdout.split()[-1] == expected


def test_only_transformers_classes_are_built_by_name(tmp_path: Path) -> None:
    save(compressed_mlp(), tmp_path)
    with pytest.raises(CheckpointError, match=r"Mlp.*only Hugging Face(.|\n)*pass model="):
        load(tmp_path)
    save(compressed_gpt2(), tmp_path / "hf")
    edit_manifest(tmp_path / "hf", lambda d: d["model"].update({"class": "subprocess:Popen"}))
    with pytest.raises(CheckpointError, match="not in transformers"):
        load(tmp_path / "hf")
    edit_manifest(tmp_path / "hf", lambda d: d["model"].update({"class": "transformers:Nothing"}))
    with pytest.raises(CheckpointError, match="does not have"):
        load(tmp_path / "hf")
    edit_manifest(
        tmp_path / "hf", lambda d: d["model"].update({"class": "transformers:GPT2Config"})
    )
    with pytest.raises(CheckpointError, match="does not have"):
        load(tmp_path / "hf")


@pytest.mark.usefixtures("offline")
def test_config_that_does_not_fit(tmp_path: Path) -> None:
    save(compressed_gpt2(), tmp_path)
    edit_manifest(tmp_path, lambda d: d["model"]["config"].update({"n_layer": 3}))
    with pytest.raises(CheckpointError, match=r"artefact has no transformer.h.2"):
        load(tmp_path)
    edit_manifest(tmp_path, lambda d: d["model"]["config"].update({"n_embd": "wide"}))
    with pytest.raises(CheckpointError, match="cannot build"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------- saving


def test_transposed_spec_is_told_of_the_parameter(tmp_path: Path) -> None:
    save(compressed_gpt2(), tmp_path)
    sites = json.loads((tmp_path / MANIFEST).read_text())["sites"]
    specs = {site["names"][0]: TTSpec.from_dict(site["spec"]) for site in sites}
    assert specs["transformer.h.0.attn.c_attn.weight"] == TTSpec.low_rank(32, 96, 5)
