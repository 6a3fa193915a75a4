"""Saving: what is refused, and a crash leaves an artefact that loads."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorize.base.errors import CheckpointError
from tensorize.reports.attach import known_report
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST, read_report
from tensorize.store.save import save
from tests.store.saved_models import (
    Mlp,
    assert_same_model,
    attach_report,
    build,
    compressed_gpt2,
    compressed_mlp,
    weights_file,
)


def test_a_model_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensorize report(.|\n)*tensorize\.compile"):
        save(build(Mlp), tmp_path / "out")
    within = torch.nn.Sequential(compressed_mlp(), torch.nn.ReLU())
    with pytest.raises(CheckpointError, match=r"get_submodule\(\"0\"\)"):
        save(within, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(torch.nn.DataParallel(compressed_mlp()), tmp_path / "out")  # is what it wraps
    assert known_report(load(tmp_path / "out", build(Mlp)))


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    model = compressed_mlp()
    model.register_buffer("pairs", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"pairs: .*cannot store complex128"):
        save(model, tmp_path)
    model.pairs = torch.zeros(2, device="meta")
    with pytest.raises(CheckpointError, match=r"pairs: .*meta device"):
        save(model, tmp_path)
    model.pairs = torch.zeros(2, 2).to_sparse()
    with pytest.raises(CheckpointError, match=r"pairs: .*plain tensor|pairs: .*cannot be stored"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        save(compressed_mlp(), tmp_path / "file")


def test_saving_twice_gives_the_same_weights_file(tmp_path: Path) -> None:
    model = compressed_mlp()
    save(model, tmp_path)
    name, text = weights_file(tmp_path).name, (tmp_path / MANIFEST).read_text()
    save(model, tmp_path)
    assert weights_file(tmp_path).name == name
    assert (tmp_path / MANIFEST).read_text() == text
    assert hashlib.sha256(weights_file(tmp_path).read_bytes()).hexdigest().startswith(name[10:26])


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    save(compressed_mlp(), tmp_path)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {usual}


def failures() -> Iterator[tuple[str, int, type[BaseException]]]:
    for error in (OSError, KeyboardInterrupt):
        for call in range(2):  # the weights, the manifest
            yield "replace", call, error
            yield "fsync", 2 * call, error


@pytest.mark.parametrize("killed", [False, True], ids=["raises", "killed"])
@pytest.mark.parametrize(("function", "call", "error"), list(failures()))
def test_a_crash_leaves_the_old_artefact(
    function: str,
    call: int,
    error: type[BaseException],
    killed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = compressed_mlp(), compressed_mlp(seed=1)
    save(old, tmp_path)
    real, calls = getattr(os, function), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call + 1:
            raise error("the disk is full")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        if killed:  # nobody cleans up after a process that was killed
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        expected = CheckpointError if error is OSError else KeyboardInterrupt
        with pytest.raises(expected):
            save(new, tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), old)
    if not killed:
        assert not list(tmp_path.glob(".*"))
    save(new, tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), new)
    assert sorted(p.name for p in tmp_path.iterdir()) == [weights_file(tmp_path).name, MANIFEST]


def test_a_crash_between_two_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration that is read belongs to the weights, whatever config.json says by then."""
    from transformers import GPT2Config, GPT2LMHeadModel

    old = compressed_gpt2()
    save(old, tmp_path)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=40, vocab_size=99)
    new = attach_report(GPT2LMHeadModel(config).eval())
    real = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == MANIFEST:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save(new, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 16
    assert_same_model(load(tmp_path), old)


def test_report_alone(tmp_path: Path) -> None:
    model = compressed_mlp()
    save(model, tmp_path)
    weights_file(tmp_path).unlink()
    report = read_report(tmp_path)
    assert report == model.__dict__["_tensorize"]
    assert report.plan.predicted.output_error == math.inf
