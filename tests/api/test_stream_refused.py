"""A checkpoint compressed by the command line, and what is refused without a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import tensorize
from tensorize.base.errors import (
    AnalysisError,
    BudgetError,
    CaptureError,
    CheckpointError,
    TensorizeError,
)
from tensorize.cli import app
from tensorize.hub import shards
from tensorize.store.manifest import MANIFEST
from tests.api.checkpoints import assert_same, compiled

pytestmark = pytest.mark.usefixtures("a_short_curve")


# --------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_says_what_a_parameter_took(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("compile", str(checkpoint), "--stream", "--budget", "0.5", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert re.search(r" [mun]s a parameter; peak resident memory ", done.stderr)
    assert "saved in" in done.stdout
    assert_same(out, compiled(checkpoint, tmp_path / "compiled"))


def test_the_command_refuses_what_needs_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    given = ("compile", str(checkpoint), "--stream", "--out", str(tmp_path / "small"))
    done = run(*given, "--autotune")
    assert done.exit_code == 2
    assert "never loads it" in done.output
    done = run(*given, "--metric", "loss")
    assert done.exit_code == 3
    assert "needs calibration data" in done.output


# ------------------------------------------------------------------------------------------- errors


def test_what_a_stream_does_not_do(checkpoint: Path, tmp_path: Path) -> None:
    batch = {"input_ids": torch.arange(32).reshape(2, 16)}

    def fails(match: str, **options: Any) -> None:
        with pytest.raises(AnalysisError, match=match):
            tensorize.compile_checkpoint(checkpoint, tmp_path / "small", **options)

    fails("needs calibration data", metric="loss")
    fails("needs calibration data", metric="input")
    fails("metric='x'", metric="x")
    fails("writes no text", calibration="self")
    fails("holds one batch", calibration=[batch])
    fails("gradients of the whole model", calibration=[batch, batch], refine="polish")


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
