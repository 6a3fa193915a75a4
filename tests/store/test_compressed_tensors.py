"""Models of four and eight bits as other readers take them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.formats.quantized import inputs_in_full
from tensorize.weight.install import factored
from tests.models import relative
from tests.weight.quantized_models import Form, put

FORMAT = "compressed-tensors"
IDS = torch.arange(12).reshape(2, 6)


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    config = hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config).eval().to(dtype)


def coded(forms: dict[str, Form], *, tied: bool = False, **how: Any) -> Any:
    """A model whose weights have a form by the end of their module's name."""
    model = llama(tied=tied, **how)
    for name in [name for name, p in model.named_parameters() if p.dim() == 2]:
        form = next((f for end, f in forms.items() if name.endswith(f"{end}.weight")), None)
        if form is not None:
            table = tied and "embed" in name
            put(model, name, form, [name, "lm_head.weight"] if table else None)
    return model


FOUR, EIGHT = ("int4", 0, False), ("int8", 0, False)
ALL: dict[str, Form] = {"proj": FOUR}
MIXED: dict[str, Form] = {"down_proj": EIGHT, "proj": FOUR, "lm_head": EIGHT, "embed_tokens": FOUR}


def decoded(tensors: dict[str, Tensor], path: str, bits: int) -> Tensor:
    """The oracle: what the layout says that codes stand for, bit by bit."""
    rows, columns = tensors[f"{path}.weight_shape"].tolist()

    def codes(words: Tensor, count: int) -> Tensor:
        shifts = torch.arange(0, 32, bits)
        apart = (words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)
        return apart.flatten(-2)[..., :count]

    scale = tensors[f"{path}.weight_scale"]
    found = codes(tensors[f"{path}.weight_packed"], columns).float()
    zeros: Tensor = torch.tensor(2.0 ** (bits - 1))
    if f"{path}.weight_zero_point" in tensors:
        zeros = codes(tensors[f"{path}.weight_zero_point"].mT, rows).mT.float()
        zeros = zeros.repeat_interleave(64, -1)
    return (found - zeros) * scale.repeat_interleave(columns // scale.shape[1], -1)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_stands_for_the_same_numbers(tied: bool, tmp_path: Path) -> None:
    model = coded(MIXED, tied=tied)
    dense = tensorize.densify(copy.deepcopy(model)).state_dict()
    tensorize.save(model, tmp_path, format=FORMAT)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    said = config["quantization_config"]
    groups = said["config_groups"].values()
    of = {path: group["weights"] for group in groups for path in group["targets"]}
    for path, how in of.items():
        assert (how["strategy"], how["symmetric"]) == (
            ("channel", True) if how["num_bits"] == 8 else ("group", False)
        )
        wanted = dense[f"{path}.weight"]
        assert relative(decoded(tensors, path, how["num_bits"]), wanted) < 1e-6
    rest = {name for name in dense if name.removesuffix(".weight") not in of}
    assert all(torch.equal(tensors[name], dense[name]) for name in rest if name in tensors)
    assert rest - tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert ("lm_head" in of) != tied
    assert said["ignore"] == (["lm_head"] if tied else [])
    assert "transformers_weights" not in config


@pytest.mark.parametrize("forms", [ALL, {"proj": EIGHT}], ids=["four", "eight"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_it_without_us(forms: Any, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = coded(forms, tied=tied)
    tensorize.save(model, tmp_path, format=FORMAT)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), inputs_in_full():
        assert relative(again(IDS).logits, model(IDS).logits) < 1e-5
    assert not any(True for _ in factored(again))


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (("int3", 0, False), "entries of int3"),
        (("int8", 4, False), "held as low_rank"),
    ],
)
def test_what_readers_do_not_take_is_named(form: Form, why: str, tmp_path: Path) -> None:
    model = coded({"up_proj": form, "proj": FOUR})
    with pytest.raises(CheckpointError, match=rf"up_proj(.|\n)*{why}(.|\n)*formats="):
        tensorize.save(model, tmp_path, format=FORMAT)
    assert not list(tmp_path.iterdir())


def test_what_no_reader_could_build_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    put(net, "0.weight", FOUR)
    with pytest.raises(CheckpointError, match=r"config.json(.|\n)*tensorize.load"):
        tensorize.save(net, tmp_path, format=FORMAT)
    with pytest.raises(CheckpointError, match="format='gguf'"):
        tensorize.save(net, tmp_path, format="gguf")


def test_a_checkpoint_that_is_there_stays(tmp_path: Path) -> None:
    model = coded(ALL)
    tensorize.save(model, tmp_path, format=FORMAT)
    with pytest.raises(CheckpointError, match="choose another directory"):
        tensorize.save(model, tmp_path, format=FORMAT)
