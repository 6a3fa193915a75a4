"""A checkpoint compressed a weight at a time: the bits of a compile of it whole, killed or not."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tensorize
from tensorize.api import analysis, write_factors
from tensorize.base.errors import (
    AnalysisError,
    BudgetError,
    CaptureError,
    CheckpointError,
    TensorizeError,
)
from tensorize.base.tensorfile import ALIGNMENT, Layout, Writer
from tensorize.cli import app
from tensorize.hub import shards
from tensorize.store import transformers_config
from tensorize.store.manifest import MANIFEST
from tests.paths import ROOT

WORK = ".tensorize-stream"


def llama(**changes: Any) -> hf.PreTrainedModel:
    config = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **changes}))


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


@pytest.fixture(autouse=True)
def _a_short_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder of budgets in a report takes ten times the rest of these small models."""
    monkeypatch.setattr(analysis, "CURVE_BUDGETS", (0.5,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "dense")


def saved(model: hf.PreTrainedModel, directory: Path, shard: str = "40kB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def compiled(directory: Path, out: Path, budget: Any = 0.5, **options: Any) -> Path:
    """What is to be matched: the model loaded whole, compiled by its weights, and saved."""
    config = hf.AutoConfig.from_pretrained(directory)
    kind = getattr(hf, config.architectures[0])
    model = kind.from_pretrained(directory, dtype="auto")
    small = tensorize.compile(model, budget, metric="frobenius", **options)
    tensorize.save(small, out)
    return out


def the_manifest(directory: Path) -> dict[str, Any]:
    """The manifest but for the curve and for what is timed: passes, and slow weights."""
    data = json.loads((directory / MANIFEST).read_text())
    data["report"]["history"] = data["report"]["curve"] = None
    data["report"]["notes"] = [note.partition("; ")[0] for note in data["report"]["notes"]]
    data["report"]["plan"]["cache"] = None
    data["model"].get("config", {}).pop("_name_or_path", None)
    return data


def assert_same(one: Path, other: Path) -> None:
    (first,), (second,) = one.glob("tensorize-*"), other.glob("tensorize-*")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert the_manifest(one) == the_manifest(other)


# --------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("name", MODELS)
def test_streaming_writes_what_compile_and_save_write(name: str, tmp_path: Path) -> None:
    dense = saved(MODELS[name](), tmp_path / "dense")
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5)
    assert report.factorized
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled"))
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == sorted(
        path.name for path in (tmp_path / "compiled").iterdir()
    )


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    dense = saved(llama(), tmp_path / "dense", "1GB")
    assert not (dense / shards.INDEX).exists()
    tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5)
    assert_same(tmp_path / "streamed", compiled(dense, tmp_path / "compiled"))


def test_first_factors_in_common(tmp_path: Path) -> None:
    """Weights of one input in different shards, with one row space."""
    model = llama(tie_word_embeddings=True)
    for layer in model.model.layers:
        rows = torch.randn(12, 48)
        for name in ("gate_proj", "up_proj"):
            weight = layer.mlp.get_submodule(name).weight
            weight.data = torch.randn(112, 12) @ rows / 100 + 0.001 * torch.randn(112, 48)
    dense = saved(model, tmp_path / "dense", "22kB")
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.6)
    assert sum(site.shared is not None for site in report.plan.sites) == 4
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
    assert str(tensorize.report(loaded)).startswith("tensorize")


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


# ------------------------------------------------------------------------------ killed, resumed


class Stopped(Exception):
    """A run that ends in the middle: what it leaves is what a killed one leaves."""


def stop(stage: str, count: int, dense: Path, out: Path) -> None:
    def watch(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, count):
            raise Stopped

    with pytest.raises(Stopped):
        tensorize.compile_checkpoint(dense, out, 0.5, progress=watch)


SCRIPT = """
import os, signal, sys
import tensorize
stage, count, dense, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
def watch(now, done, total):
    if now == stage and done == count:
        os.kill(os.getpid(), signal.SIGKILL)
tensorize.compile_checkpoint(dense, out, 0.5, progress=watch)
"""


def test_a_run_killed_twice_goes_on_after_the_last_weight(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for stage, count in (("spectra", 5), ("factorize", 6)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, stage, str(count), str(checkpoint), str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (out / MANIFEST).exists()
    report = tensorize.compile_checkpoint(checkpoint, out, 0.5)
    spectra = next(stage for stage in report.history if stage.name == "spectra")
    assert "16 were kept by an earlier run" in spectra.summary
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))
    assert not (out / WORK).exists()


@pytest.mark.parametrize(
    ("stage", "count", "kept"), [("reading", 3, 0), ("spectra", 5, 5), ("shared factors", 2, 16)]
)
def test_what_is_finished_is_not_made_again(
    stage: str, count: int, kept: int, checkpoint: Path, tmp_path: Path
) -> None:
    stop(stage, count, checkpoint, tmp_path / "stopped")
    told: list[tuple[str, int]] = []
    tensorize.compile_checkpoint(
        checkpoint,
        tmp_path / "stopped",
        0.5,
        progress=lambda stage, done, total: told.append((stage, done)),
    )
    assert next(done for stage, done in told if stage == "spectra") == kept
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


def test_a_run_stopped_while_it_writes_goes_on_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop("factorize", 6, checkpoint, tmp_path / "stopped")
    (journal,) = (tmp_path / "stopped" / WORK).glob("*.jsonl")
    written = {name for line in journal.read_text().splitlines() for name in json.loads(line)}
    assert len(written) >= 6
    with open(journal, "a") as file:
        file.write('{"model.lay')  # a line that was cut off counts in nothing
    made: list[str] = []
    plain = write_factors.replace_weight

    def replace_weight(model: Any, site: Any, *rest: Any) -> float:
        made.append(site.name)
        return plain(model, site, *rest)

    monkeypatch.setattr(write_factors, "replace_weight", replace_weight)
    tensorize.compile_checkpoint(checkpoint, tmp_path / "stopped", 0.5)
    assert made
    assert not written & set(made)
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


@pytest.mark.parametrize("where", ["the configurations", "clearing up", "a file taken away"])
def test_a_run_that_ends_after_the_last_weight_is_made_whole_by_the_next(
    where: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in its place by then, and what was said of the draft holds of none."""
    out = tmp_path / "stopped"
    if where == "a file taken away":
        stop("factorize", 6, checkpoint, out)
        (draft,) = (out / WORK).glob("*.tmp")
        draft.unlink()
    else:
        place = {
            "the configurations": (transformers_config, "save_configs"),
            "clearing up": (shutil, "rmtree"),
        }[where]

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left on device")

        with monkeypatch.context() as patch, contextlib.suppress(CheckpointError):
            patch.setattr(*place, full)
            tensorize.compile_checkpoint(checkpoint, out, 0.5)
    tensorize.compile_checkpoint(checkpoint, out, 0.5)
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))
    assert not (out / WORK).exists()


def test_a_damaged_curve_is_made_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop("spectra", 9, checkpoint, tmp_path / "stopped")
    kept = sorted((tmp_path / "stopped" / WORK).glob("analysis-*/*.safetensors"))
    assert len(kept) == 9
    kept[0].write_bytes(kept[0].read_bytes()[:-7])
    tensorize.compile_checkpoint(checkpoint, tmp_path / "stopped", 0.5)
    assert "is damaged and is made again" in caplog.text
    assert_same(tmp_path / "stopped", compiled(checkpoint, tmp_path / "compiled"))


def test_another_checkpoint_begins_anew(checkpoint: Path, tmp_path: Path) -> None:
    """What was kept is found by the content of the weights, and not by their place."""
    stop("spectra", 9, checkpoint, tmp_path / "out")
    torch.manual_seed(7)
    saved(llama(), checkpoint)
    tensorize.compile_checkpoint(checkpoint, tmp_path / "out", 0.5)
    assert_same(tmp_path / "out", compiled(checkpoint, tmp_path / "compiled"))


def test_curves_are_kept_for_other_budgets(checkpoint: Path, tmp_path: Path) -> None:
    first = tensorize.compile_checkpoint(checkpoint, tmp_path / "a", 0.5, cache_dir=tmp_path / "c")
    other = tensorize.compile_checkpoint(checkpoint, tmp_path / "b", 0.3, cache_dir=tmp_path / "c")
    kept = [next(s for s in r.history if s.name == "spectra").summary for r in (first, other)]
    assert "kept by an earlier run" not in kept[0]
    assert "16 were kept by an earlier run" in kept[1]
    assert_same(tmp_path / "b", compiled(checkpoint, tmp_path / "compiled", 0.3))


# ------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_says_what_a_parameter_took(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("compile", str(checkpoint), "--stream", "--budget", "0.5", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert " µs a parameter; peak resident memory " in done.stderr
    assert "saved in" in done.stdout
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))


def test_the_command_refuses_what_needs_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    given = ("compile", str(checkpoint), "--stream", "--out", str(tmp_path / "small"))
    done = run(*given, "--autotune")
    assert done.exit_code == 2
    assert "never loads it" in done.output
    done = run(*given, "--metric", "loss")
    assert done.exit_code == 3
    assert "needs the backward pass of the whole model" in done.output


# --------------------------------------------------------------------------------------- errors


def test_metrics_that_do_not_stream(checkpoint: Path, tmp_path: Path) -> None:
    for metric, why in (("loss", "backward pass"), ("input", "forward passes"), ("x", "no such")):
        with pytest.raises(AnalysisError, match=why):
            tensorize.compile_checkpoint(checkpoint, tmp_path / "small", metric=metric)


def test_a_directory_that_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    def fails(match: str, error: type[TensorizeError] = CaptureError, source: Any = None) -> None:
        with pytest.raises(error, match=match):
            tensorize.compile_checkpoint(source or checkpoint, tmp_path / "small", 0.5)

    fails("no directory", source=tmp_path / "nowhere")
    fails("holds neither", source=tmp_path)
    index = checkpoint / shards.INDEX
    before = index.read_text()
    index.write_text(before[:-30])
    fails("is damaged")
    table = json.loads(before)
    del table["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(table))
    fails("model.norm.weight: .* holds no values for it")
    index.write_text(before)
    shard = checkpoint / table["weight_map"]["lm_head.weight"]
    whole = shard.read_bytes()
    shard.unlink()
    fails(f"names {shard.name}, which is not there")
    shard.write_bytes(whole[: len(whole) // 2])
    fails("cannot be read")
    shard.write_bytes(whole)
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file({n: torch.full_like(t, torch.nan) for n, t in tensors.items()}, shard)
    fails("NaN", AnalysisError)
    save_file({n: t[:5].clone() for n, t in tensors.items()}, shard)
    fails("config.json asks for")
    (checkpoint / "config.json").write_text('{"model_type": "no such model"}')
    fails("cannot build the model")
    assert not (tmp_path / "small" / MANIFEST).exists()


def test_a_compressed_model_is_not_compressed_again(checkpoint: Path, tmp_path: Path) -> None:
    tensorize.compile_checkpoint(checkpoint, tmp_path / "small", 0.5)
    with pytest.raises(CaptureError, match="compressed already"):
        tensorize.compile_checkpoint(tmp_path / "small", tmp_path / "smaller", 0.5)


def test_a_budget_that_cannot_be_met_leaves_no_artefact(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        tensorize.compile_checkpoint(checkpoint, tmp_path / "small", 1e-6)
    assert not (tmp_path / "small" / MANIFEST).exists()


def test_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="own directory"):
        tensorize.compile_checkpoint(checkpoint, checkpoint, 0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tensorize.compile_checkpoint(checkpoint, tmp_path / "file" / "small", 0.5)


# ------------------------------------------------------------------------------ files of tensors


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
