"""A folder as an engine sees it, without one: layers that are merged run through factors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.serve.folder import Folder, Table
from tensorize.serve.layout import MergedLinear, sections
from tensorize.serve.matrices import Matrix
from tests.serve import damaged, models

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}
HEADS, GROUPS, SIZE, WIDTH, INNER = 4, 2, 32, 128, 256


class Product(nn.Module):
    def __init__(self, matrix: Matrix, device: torch.device) -> None:
        super().__init__()
        self.weight = matrix.entries

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)


class Linear(MergedLinear):
    product = Product


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved(models.CASES["mixed"], tmp_path_factory.mktemp("mixed"))


def opened(directory: Path, say: Callable[[str], None] = print) -> Folder:
    config = json.loads((directory / "config.json").read_text())
    folder = Folder(config["quantization_config"], "vllm", say)
    folder.of_model("llama")
    return folder


def tensors(directory: Path) -> dict[str, Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def layers(folder: Folder, rank: int, world: int) -> dict[str, Any]:
    """The layers of the first block, as an engine of so many ranks makes them."""
    kinds = {
        "self_attn.qkv_proj": ([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE], WIDTH, False),
        "self_attn.o_proj": ([WIDTH], HEADS * SIZE, True),
        "mlp.gate_up_proj": ([INNER, INNER], WIDTH, False),
        "mlp.down_proj": ([WIDTH], INNER, True),
    }
    made = {}
    for name, (totals, columns, of_inputs) in kinds.items():
        method = Linear(folder.parts(f"model.layers.0.{name}", PACKED), folder)
        layer = SimpleNamespace(method=method, totals=totals, rank=rank, world=world)
        own = columns // world if of_inputs else columns
        rows = totals if of_inputs else [total // world for total in totals]
        method.create_weights(layer, own, rows, columns, sum(totals), torch.float32)
        made[name] = layer
    return made


def load(made: dict[str, Any], folder: Folder, directory: Path, given: dict[str, Tensor]) -> None:
    """What an engine's loaders do, and its work afterwards."""
    dense = models.dense(models.CASES["mixed"])
    for key, tensor in folder.seen(given.items(), dense, directory):
        for name, layer in made.items():
            above, _, leaf = name.rpartition(".")
            for k, own in enumerate(PACKED.get(leaf, [leaf])):
                if key == f"model.layers.0.{above}.{own}.weight":
                    layer.weight.weight_loader(layer.weight, tensor, SHARDS.get(leaf, [0])[k])
    for layer in made.values():
        layer.method.place(layer, layer.totals, layer.rank, layer.world)


@pytest.mark.parametrize("world", [1, 2])
def test_layers_give_what_the_folders_model_gives(world: int, directory: Path) -> None:
    ranks = []
    for rank in range(world):
        folder = opened(directory)
        ranks.append(layers(folder, rank, world))
        load(ranks[-1], folder, directory, tensors(directory))
    model: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    block = model.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    for name in ranks[0]:
        above, _, leaf = name.rpartition(".")
        parts = [getattr(block.get_submodule(above), own) for own in PACKED.get(leaf, [leaf])]
        x = torch.randn(5, parts[0].in_features, generator=generator)
        wanted = [part(x.double()) for part in parts]
        if leaf in PACKED:
            found = [made[name].method.apply(made[name], x) for made in ranks]
            sizes = [part.shape[-1] // world for part in wanted]
            split = zip(*(each.split(sizes, -1) for each in found), strict=True)
            got = [torch.cat(part, -1) for part in split]
        else:
            shares = zip(ranks, x.chunk(world, -1), strict=True)
            got = [sum(made[name].method.apply(made[name], own) for made, own in shares)]
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5)


def test_what_no_layer_runs_is_made_whole_and_said(directory: Path) -> None:
    said: list[str] = []
    folder = opened(directory, said.append)
    layers(folder, 0, 1)
    dense = models.dense(models.CASES["mixed"])
    seen = dict(folder.seen(tensors(directory).items(), dense, directory))
    model: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole = tensorize.densify(model).model.embed_tokens.weight
    torch.testing.assert_close(seen["model.embed_tokens.weight"], whole, rtol=0, atol=1e-5)
    assert any("model.embed_tokens.weight is made whole" in line for line in said)
    assert "model.layers.1.mlp.down_proj.weight" in seen
    assert not [key for key in seen if ".first." in key or ".second." in key]
    assert set(seen) <= set(dense.state_dict())


def test_tables_are_found_by_their_names_or_their_only_shape(directory: Path) -> None:
    folder = opened(directory)
    named = folder.table(Table("lm_head", (models.WORDS, WIDTH)))
    assert named is not None
    assert named.names == ("lm_head.weight",)
    nameless = folder.table(Table("", (models.WORDS, WIDTH)))
    assert nameless is not None
    assert nameless.names == ("model.embed_tokens.weight",)
    assert folder.table(Table("model.elsewhere", (models.WORDS, WIDTH))) is None
    assert folder.claimed == [], "nobody asked for them yet"


@pytest.mark.parametrize(
    "key", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.first.weight"]
)
def test_what_does_not_arrive_is_named(key: str, directory: Path, tmp_path: Path) -> None:
    target = damaged.without(directory, key, tmp_path, manifest=False)
    folder = opened(target)
    with pytest.raises(CheckpointError, match=f"{key}|up_proj.weight"):
        load(layers(folder, 0, 1), folder, target, tensors(target))


def test_a_weight_that_has_no_place_is_named(directory: Path, tmp_path: Path) -> None:
    folder = opened(damaged.with_site(directory, tmp_path, damaged.renamed))
    with pytest.raises(CheckpointError, match="dawn_proj"):
        load(layers(folder, 0, 1), folder, directory, tensors(directory))


def test_it_is_sent_to_other_processes(directory: Path) -> None:
    folder = opened(directory)
    again = pickle.loads(pickle.dumps(folder))
    assert again.sites == folder.sites
    assert again.table(Table("lm_head", (models.WORDS, WIDTH))) is not None


def test_newer_folders_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="format version 99"):
        Folder({**config, "format_version": 99}, "vllm", print)


def test_sections_are_those_of_all_ranks() -> None:
    attention = SimpleNamespace(
        total_num_heads=8, total_num_kv_heads=2, head_size=16, v_head_size=24, output_size=1
    )
    assert sections(attention, [64, 16, 24], of_attention=True) == [128, 32, 48]
    merged = SimpleNamespace(output_sizes=[256, 256], output_size=512)
    assert sections(merged, [128, 128], of_attention=False) == [256, 256]
    assert sections(merged, [512], of_attention=False) == [512]
