"""A checkpoint compressed layer by layer on calibration data: the bits of a compile of it whole."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import tensorize
from tensorize.base.errors import AnalysisError
from tensorize.cli import app
from tensorize.hub import shards
from tensorize.passes.observe import parts
from tensorize.passes.observe.gathering import Gathering
from tensorize.store.manifest import MANIFEST
from tests.api.checkpoints import assert_same, kill, llama, saved
from tests.api.test_stream import gpt2, mixtral

pytestmark = pytest.mark.usefixtures("a_short_curve")


def gemma() -> hf.PreTrainedModel:
    """Layers that are given different masks and positions."""
    sizes = llama().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = hf.Gemma3TextConfig(
        **{name: sizes[name] for name in names},
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return hf.Gemma3ForCausalLM(config)


def opt() -> hf.PreTrainedModel:
    """Linears before and after the layers."""
    config = hf.OPTConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return hf.OPTForCausalLM(config)


def classifier() -> hf.PreTrainedModel:
    """One output row a sample, and a table that is measured by itself."""
    config = hf.BertConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=112,
        max_position_embeddings=64,
        num_labels=5,
    )
    return hf.BertForSequenceClassification(config)


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "gpt2": gpt2,
    "gemma": gemma,
    "opt": opt,
    "mixtral": mixtral,
    "classifier": classifier,
}
FAST = "llama in bfloat16"


def data(count: int = 4, *, hidden: int = 0) -> list[dict[str, Tensor]]:
    """Batches of three texts; of the last one so many tokens are padding."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(96, (3, 16), generator=generator) for _ in range(count)]
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[-1, 16 - hidden :] = 0
    return [{"input_ids": each, "attention_mask": mask} for each in ids]


def whole(directory: Path, out: Path, **options: Any) -> Path:
    """What is to be matched: the model loaded whole, compiled and saved."""
    config = hf.AutoConfig.from_pretrained(directory)
    model = getattr(hf, config.architectures[0]).from_pretrained(directory, dtype="auto")
    tensorize.save(tensorize.compile(model, 0.5, **options), out)
    return out


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in MODELS],
)
def test_layer_by_layer_writes_what_compile_and_save_write(name: str, tmp_path: Path) -> None:
    dense, given = saved(MODELS[name](), tmp_path / "dense"), {"calibration": data(2, hidden=5)}
    given["refine"] = "refit"
    report = tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5, **given)
    assert report.factorized
    assert report.plan.refine == "refit"
    assert_same(tmp_path / "streamed", whole(dense, tmp_path / "whole", **given))
    assert not (tmp_path / "streamed" / ".tensorize-stream").exists()


# ------------------------------------------------------------------------------------ gone on with


class Stopped(Exception):
    """A run that ends in the middle: what it leaves is what a killed one leaves."""


STOPS = [
    ("forward", 5),
    ("forward", 11),
    ("rows", 6),
    ("statistics", 0),
    ("statistics", 3),
    ("spectra", 4),
    ("statistics", 6),
    ("shared factors", 1),
    ("prediction", 4),
    ("prediction", 12),
    ("refit", 2),
    ("factorize", 3),
]


@pytest.mark.slow
def test_a_run_stopped_again_and_again_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Wherever it ends: forth, back, between two curves of a layer, in the trials, at the file."""
    dense, out = saved(llama(tie_word_embeddings=True), tmp_path / "dense"), tmp_path / "stopped"
    given = {"calibration": data(hidden=5), "refine": "refit"}
    told: list[tuple[str, int]] = []
    for stop in (*STOPS, None):

        def watch(stage: str, done: int, total: int, stop: Any = stop) -> None:
            told.append((stage, done))
            assert done <= total
            if (stage, done) == stop:
                raise Stopped

        with contextlib.nullcontext() if stop is None else pytest.raises(Stopped):
            tensorize.compile_checkpoint(dense, out, 0.5, progress=watch, **given)
    assert_same(out, whole(dense, tmp_path / "whole", **given))
    assert not (out / ".tensorize-stream").exists()


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, out = saved(llama(), tmp_path / "dense"), tmp_path / "stopped"

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("prediction", 0):
            raise Stopped

    given = {"calibration": data(2), "refine": None, "scratch": tmp_path / "scratch"}
    with pytest.raises(Stopped):
        tensorize.compile_checkpoint(dense, out, 0.5, progress=stop, **given)
    assert list((tmp_path / "scratch").glob("layers-*/hidden-*"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("all curves are there")

    monkeypatch.setattr(Gathering, "add_gradients", never)
    report = tensorize.compile_checkpoint(dense, out, 0.5, **given)
    curves = next(stage for stage in report.history if stage.name == "curves")
    assert "16 kept by an earlier run" in curves.summary
    assert not list((tmp_path / "scratch").iterdir())


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights of layers that were read no more are alive than those of one."""
    dense = saved(llama(num_hidden_layers=3), tmp_path / "dense")
    alive: list[tuple[str, Any]] = []
    most: set[int] = set()
    plain = shards.Checkpoint.read

    def read(self: shards.Checkpoint, name: str) -> Tensor:
        value = plain(self, name)
        alive.append((name, weakref.ref(value.untyped_storage())))
        held = {key.split(".")[2] for key, ref in alive if ref() is not None and "layers" in key}
        most.add(len(held))
        return value

    def begin(stage: str, done: int, total: int) -> None:
        if stage == "reading":  # where all weights are looked at, one by one
            most.clear()

    monkeypatch.setattr(shards.Checkpoint, "read", read)
    given = {"calibration": data(2), "refine": None, "progress": begin}
    tensorize.compile_checkpoint(dense, tmp_path / "small", 0.5, **given)
    assert max(most) == 1


SCRIPT = """
import os, signal, sys
import torch, tensorize
from tests.api.test_stream_layers import data
stage, count, dense, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
def watch(now, done, total):
    if now == stage and done == count:
        os.kill(os.getpid(), signal.SIGKILL)
tensorize.compile_checkpoint(dense, out, 0.5, calibration=data(), progress=watch)
"""


@pytest.mark.slow
def test_a_run_killed_three_times_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    dense, out = saved(llama(), tmp_path / "dense"), tmp_path / "killed"
    for stage, count in (("forward", 6), ("statistics", 4), ("prediction", 5)):
        kill(SCRIPT, stage, count, dense, out)
    tensorize.compile_checkpoint(dense, out, 0.5, calibration=data())
    assert_same(out, whole(dense, tmp_path / "whole", calibration=data()))


@pytest.mark.slow
def test_batches_are_cut_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is kept of each, where the model gives the same for parts of one."""
    monkeypatch.setattr(parts, "_KEPT_BYTES", 200_000)
    dense = saved(llama(), tmp_path / "dense")
    given, totals = {"calibration": data(2), "refine": None}, set[int]()

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "forward":
            totals.add(total)

    tensorize.compile_checkpoint(dense, tmp_path / "streamed", 0.5, progress=watch, **given)
    assert totals == {(2 + 1) * (6 + 2)}, "six texts, two of them together, and two that differ"
    assert_same(tmp_path / "streamed", whole(dense, tmp_path / "whole", **given))


@pytest.mark.slow
def test_the_command_takes_data(tmp_path: Path) -> None:
    dense, given = saved(llama(), tmp_path / "dense"), [batch["input_ids"] for batch in data()]
    save_file({"input_ids": torch.cat(given)}, tmp_path / "tokens.safetensors")
    arguments = ["compile", str(dense), "--stream", "--metric", "loss", "--budget", "0.5"]
    arguments += ["--calibration", str(tmp_path / "tokens.safetensors"), "--batch-size", "3"]
    arguments += ["--out", str(tmp_path / "streamed"), "--scratch", str(tmp_path / "scratch")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    batches = [{"input_ids": ids} for ids in given]
    assert_same(tmp_path / "streamed", whole(dense, tmp_path / "whole", calibration=batches))


# ---------------------------------------------------------------------------------------- refused


def test_what_is_no_chain_is_refused(tmp_path: Path) -> None:
    config = hf.AlbertConfig(
        vocab_size=96,
        embedding_size=24,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=112,
        max_position_embeddings=64,
    )
    dense = saved(hf.AlbertForMaskedLM(config), tmp_path / "dense")
    with pytest.raises(AnalysisError, match=r'layer by layer: .*\n.*metric="frobenius"'):
        tensorize.compile_checkpoint(dense, tmp_path / "small", 0.5, calibration=data())
    assert not (tmp_path / "small" / MANIFEST).exists()
    tensorize.compile_checkpoint(
        dense, tmp_path / "small", 0.5, calibration=data(), metric="frobenius"
    )
