"""A checkpoint compressed a weight at a time: the bits of a compile of it whole."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tensorize
from tensorize.base.tensorfile import ALIGNMENT, Layout, Writer
from tensorize.hub import shards
from tensorize.ir.machine import Machine
from tests.api.checkpoints import assert_same, compiled, llama, saved
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("a_short_curve")


def gpt2() -> hf.PreTrainedModel:
    """Linears stored as (in, out), biases, and tied embeddings."""
    config = hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    return hf.GPT2LMHeadModel(config)


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=112,
        max_position_embeddings=64,
    )
    return hf.BertForMaskedLM(config)


def vit() -> hf.PreTrainedModel:
    config = hf.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=112,
        image_size=32,
        patch_size=8,
    )
    return hf.ViTForImageClassification(config)


def mixtral() -> hf.PreTrainedModel:
    """Experts: one by one in the checkpoint, a stack in the model."""
    config = hf.MixtralConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=3,
        max_position_embeddings=64,
    )
    return hf.MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "mixtral": mixtral,
}


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("name", MODELS)
def test_streaming_writes_what_compile_and_save_write(name: str, tmp_path: Path) -> None:
    dense = saved(MODELS[name](), tmp_path / "dense")
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5)
    assert report.factorized
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled"))
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == sorted(
        path.name for path in (tmp_path / "compiled").iterdir()
    )


@pytest.mark.parametrize("name", ["tied llama", slow("llama in bfloat16"), slow("gpt2"), "mixtral"])
def test_streaming_takes_bits(name: str, tmp_path: Path) -> None:
    dense, how = saved(MODELS[name](), tmp_path / "dense"), {"precision": "auto"}
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.2, **how)
    assert any(site.precision for site in report.sites)
    assert report.totals.share.bytes <= 0.2
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled", 0.2, **how))


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    dense = saved(llama(), tmp_path / "dense", "1GB")
    assert not (dense / shards.INDEX).exists()
    tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5)
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled"))


@pytest.mark.parametrize("pivots", [False, True])
def test_first_factors_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pivots: bool
) -> None:
    """Weights of one input in different shards, with one row space."""
    if not pivots:
        monkeypatch.setattr(Machine, "reads_orders", False)
    model = llama(tie_word_embeddings=True)
    for layer in model.model.layers:
        rows = torch.randn(12, 48)
        for name in ("gate_proj", "up_proj"):
            weight = layer.mlp.get_submodule(name).weight
            weight.data = torch.randn(112, 12) @ rows / 100 + 0.001 * torch.randn(112, 48)
    dense = saved(model, tmp_path / "dense", "22kB")
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.6)
    common = [site.spec for site in report.plan.sites if site.shared is not None]
    assert len(common) == 4
    assert all(spec is not None and spec.pivoted == pivots for spec in common)
    index = json.loads((dense / shards.INDEX).read_text())["weight_map"]
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
    assert len({index[name] for name in names}) == 2
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled", 0.6))


def test_tensor_trains_and_blocks(checkpoint: Path, tmp_path: Path) -> None:
    options = {"formats": {"*mlp*": "tt", "*attn*": ["block", "dense"]}}
    report = tensorize.compile_checkpoint(checkpoint, tmp_path / "streamed", 0.6, **options)
    assert {"tt", "block"} <= {site.format for site in report.sites}
    assert_same(tmp_path / "streamed", compiled(checkpoint, tmp_path / "compiled", 0.6, **options))


def test_the_result_loads_as_any_other(checkpoint: Path, tmp_path: Path) -> None:
    tensorize.compile_checkpoint(checkpoint, tmp_path / "small", 0.5)
    ids = torch.arange(12)[None]
    loaded = tensorize.load(tmp_path / "small")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    assert str(tensorize.report(loaded)).startswith("kept: ")


def test_a_checkpoint_that_holds_tied_weights_twice(tmp_path: Path) -> None:
    """Alike they are one weight, as from_pretrained has it; apart they are two."""
    dense = saved(llama(tie_word_embeddings=True), tmp_path / "dense", "1GB")
    tensors = load_file(dense / shards.SINGLE)
    table = tensors["model.embed_tokens.weight"]
    for head, sites in ((table.clone(), 1), (table + 1, 2)):
        save_file({**tensors, "lm_head.weight": head}, dense / shards.SINGLE, {"format": "pt"})
        report = tensorize.compile_checkpoint(dense, tmp_path / f"streamed{sites}", 0.5)
        assert sum(site.shape == table.shape for site in report.sites) == sites
        assert_same(tmp_path / f"streamed{sites}", compiled(dense, tmp_path / f"compiled{sites}"))


def test_no_more_than_one_weight_is_read_at_a_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights that were read no more are alive than those of one input."""
    alive: list[Any] = []
    most = 0
    plain = shards.Checkpoint.read

    def read(self: shards.Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        value = plain(self, name)
        alive.append(weakref.ref(value.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(shards.Checkpoint, "read", read)
    tensorize.compile_checkpoint(checkpoint, tmp_path / "small", 0.5)
    assert len(alive) > 40
    assert 3 <= most <= 4  # q, k and v are taken together


# --------------------------------------------------------------------------------- files of tensors


def test_a_file_written_by_parts_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(5, 3),
        "a.weight": torch.randn(7).to(torch.bfloat16),
        "ä": torch.arange(4),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(2.0, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    layout = Layout.usual(tensors, {"format": "pt"})
    for name in reversed(tensors):  # in any order, and in two sittings
        with Writer(tmp_path / "parts", layout) as file:
            file.put(name, tensors[name])
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_to_be_mapped_has_its_tensors_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(5, 7), "c": torch.arange(3.0).double()}
    with Writer(tmp_path / "file", Layout.aligned(tensors, {"data": "x"})) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
    with safe_open(tmp_path / "file", framework="pt") as read:
        assert read.metadata() == {"data": "x"}
        for name, tensor in tensors.items():
            found = read.get_tensor(name)
            assert torch.equal(found, tensor)
            assert found.data_ptr() % ALIGNMENT == 0
