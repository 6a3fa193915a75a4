"""Compiled Hugging Face models are saved, and read by transformers and by ``load``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.weight.install import factored
from tests.hub.compressed_models import AUTO, MODELS, compress, forms, same_state
from tests.models import CASES, relative

ALL = forms()


@ALL
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_from_pretrained_reads_what_was_saved(
    name: str, form: str, way: str, tmp_path: Path
) -> None:
    case, saved = MODELS[name], compress(name, form)
    if way == "save":
        tensorize.save(saved, tmp_path)
    else:
        saved.save_pretrained(tmp_path)
    loaded, info = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # nothing is missing, and nothing too much
    assert type(loaded) is type(saved)
    same_state(loaded, saved)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]
    assert relative(case.output(loaded), case.output(saved)) < 1e-5
    assert loaded.all_tied_weights_keys == saved.all_tied_weights_keys
    assert not loaded.training
    assert not loaded.is_quantized  # so that transformers lets it train and be cast
    if way == "save":
        assert tensorize.report(loaded) == tensorize.report(saved)
    loaded.save_pretrained(tmp_path / "again")
    same_state(AUTO[name].from_pretrained(tmp_path / "again"), saved)


@ALL
@pytest.mark.slow
def test_load_builds_the_model_by_itself(name: str, form: str, tmp_path: Path) -> None:
    case, saved = MODELS[name], compress(name, form)
    tensorize.save(saved, tmp_path)
    loaded = tensorize.load(tmp_path)
    assert case.output(loaded).equal(case.output(saved))
    half: Any = tensorize.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.bfloat16

    def tables(model: Any) -> dict[str, torch.dtype]:  # those of rotary embeddings
        state = model.state_dict()
        return {n: b.dtype for n, b in model.named_buffers() if n not in state}

    assert tables(half) == tables(saved)
    if name not in ("vit", "ibert with head"):  # which take no bfloat16 as it is
        assert relative(case.output(half).float(), case.output(saved)) < 0.1
    loaded.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    same_state(AUTO[name].from_pretrained(tmp_path / "again"), saved)


@pytest.mark.parametrize("name", ["llama", "bert with head", "mixtral"])
def test_from_pretrained_in_another_dtype_and_without_the_head(name: str, tmp_path: Path) -> None:
    saved = compress(name)
    tensorize.save(saved, tmp_path)
    half = AUTO[name].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    base = hf.AutoModel.from_pretrained(tmp_path)
    own = getattr(saved, saved.base_model_prefix).state_dict()
    assert all(own[key].equal(value) for key, value in base.state_dict().items() if key in own)
    assert list(factored(base))


def test_load_moves_and_casts_into_a_model(tmp_path: Path) -> None:
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path)
    with torch.device("meta"):
        blank = CASES["gpt2"].model()
    loaded: Any = tensorize.load(tmp_path, blank, device="cpu", dtype=torch.float64)
    assert loaded is blank
    assert {(p.dtype, p.device.type) for p in loaded.parameters()} == {(torch.float64, "cpu")}
    assert loaded.lm_head.second.weight is loaded.transformer.wte.weight_cores.core_0
    with pytest.raises(CheckpointError, match=r"torch\.int8 is no floating-point dtype"):
        tensorize.load(tmp_path, dtype=torch.int8)


def python(code: str, *arguments: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()), len(tensorize.report(model).sites))
"""


@pytest.mark.parametrize(
    "first", ["tensorize", pytest.param("transformers", marks=pytest.mark.slow)]
)
def test_importing_both_is_enough_in_any_order(first: str, tmp_path: Path) -> None:
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path)
    code = (
        "import importlib.util, sys, tensorize\n"
        "assert not {'transformers', 'peft'} & set(sys.modules)\n"
        "assert importlib.util.find_spec('transformers.quantizers.auto')\n"  # asked, not imported
    )
    if first == "transformers":
        code = "import sys\nfrom transformers import AutoModel\nimport tensorize\n"
    output = python(f"{code}from transformers import AutoModelForCausalLM\n{LOAD}", tmp_path)
    count = sum(p.numel() for p in saved.parameters())
    assert output.split()[-2:] == [str(count), str(len(tensorize.report(saved).sites))]


ALONE = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel
for path in sys.argv[1:]:
    for kind in (AutoModel, AutoModelForCausalLM, GPT2LMHeadModel):
        for given in ({}, {"attn_implementation": "eager"}, {"experts_implementation": "eager"}):
            try:
                kind.from_pretrained(path, **given)
            except ValueError as error:
                print("import tensorize" in str(error))
assert "tensorize" not in sys.modules
"""


def test_transformers_alone_refuses_to_make_up_weights(tmp_path: Path) -> None:
    """In a sentence that names us, whoever wrote the folder and however it is read."""
    saved: Any = compress("gpt2")
    tensorize.save(saved, tmp_path / "ours")
    saved.save_pretrained(tmp_path / "theirs")
    saved.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    paths = [tmp_path / name for name in ("ours", "theirs", "shards")]
    assert python(ALONE, *paths).split() == ["True"] * 27
    for path in paths:  # and with us it is there, and goes on as it came
        loaded = hf.AutoModelForCausalLM.from_pretrained(path)
        same_state(loaded, saved)
        loaded.save_pretrained(path / "again")
    assert python(ALONE, *(path / "again" for path in paths)).split() == ["True"] * 27


def test_a_compressed_configuration_builds_the_dense_architecture(tmp_path: Path) -> None:
    """With tensorize the marks in a configuration refuse nothing, and densify takes them away."""
    saved: Any = compress("mixtral")
    saved.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    blank: Any = hf.AutoModelForCausalLM.from_config(config)
    ids = torch.arange(8).reshape(2, 4)
    assert blank(ids).logits.isfinite().all()
    tensorize.save(saved, tmp_path / "ours")
    same_state(tensorize.load(tmp_path / "ours", blank), saved)
    dense: Any = tensorize.densify(saved)
    assert "tensorize" not in dense.config.to_json_string()
    dense.save_pretrained(tmp_path / "dense")
    assert "tensorize" not in (tmp_path / "dense/config.json").read_text()


def test_every_part_of_a_configuration_is_marked(tmp_path: Path) -> None:
    """A class that reads a part of it alone makes up no weights either."""
    config = hf.CLIPConfig(
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 99},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    small: Any = tensorize.compile(hf.CLIPModel(config), 0.5, metric="frobenius")
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import tensorize"):
        hf.CLIPTextModel.from_pretrained(tmp_path)
    same_state(hf.CLIPModel.from_pretrained(tmp_path), small)


def test_damage_of_what_from_pretrained_reads_is_found(tmp_path: Path) -> None:
    saved: Any = compress("gpt2")
    tensorize.save(saved, tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()

    def refused(match: str, **values: Any) -> None:
        data = json.loads(whole)
        data["quantization_config"].update(values)
        config.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=match):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        config.write_text(whole)

    noted = json.loads(whole)["quantization_config"]
    refused("their sha256", sites=noted["sites"][1:])
    refused("their sha256", aliases={})
    refused("damaged: TypeError", sites=5, sha256=None)
    refused("damaged: AttributeError", aliases=["x"], sha256=None)
    refused("format version", format_version="1")
    (path,) = tmp_path.glob("tensorize-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not that of its name"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_configurations_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    saved = compress("gpt2")

    def change(**values: Any) -> None:
        tensorize.save(saved, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"].update(values, sha256=None)
        (tmp_path / "config.json").write_text(json.dumps(config))

    change(format_version=99)
    with pytest.raises(CheckpointError, match=r"format version 99(.|\n)*upgrade tensorize"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    sites = json.loads((tmp_path / "tensorize.json").read_text())["sites"]
    sites[0]["shape"] = [64, 64]
    change(sites=sites)
    with pytest.raises(CheckpointError, match=r"wte\.weight: .*shape \(128, 32\), and \(64, 64\)"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_note_in_a_configuration_goes_with_the_factors(tmp_path: Path) -> None:
    model = CASES["gpt2"].model()
    result = tensorize.compile(model, 0.5)
    assert not hasattr(model.config, "quantization_config")
    assert result.config.quantization_config["quant_method"] == "tensorize"
    plain = tensorize.densify(result)
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(factored(loaded)) == []
    same_state(loaded, plain)


def test_from_pretrained_after_a_crash_reads_one_save_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = compress("gpt2"), tensorize.compile(CASES["gpt2"].model(), 0.5)
    tensorize.save(old, tmp_path)
    replace, calls = os.replace, []
    names = ["tensorize-", "config.json", "generation_config.json", "tensorize.json"]

    def failing(source: Any, target: Any) -> None:
        if Path(target).name.startswith(names[len(calls)]):
            calls.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    while len(calls) < len(names):  # a crash before each file comes into its place
        crashed = len(calls)
        with pytest.raises(KeyboardInterrupt):
            tensorize.save(new, tmp_path)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        same_state(loaded, old if crashed < 2 else new)
        same_state(tensorize.load(tmp_path), old)
