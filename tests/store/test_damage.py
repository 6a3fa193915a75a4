"""What is damaged or does not fit is named, and the model passed is left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tensorize.base.errors import CheckpointError
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST, read_report
from tensorize.store.save import save
from tests.store.saved_models import (
    Mlp,
    Pixels,
    Recurrent,
    attach_report,
    build,
    compressed_mlp,
    compressed_pixels,
    edit_manifest,
    factorize,
    same_bits,
    weights_file,
)


def cut(directory: Path, keep: float) -> None:
    path = weights_file(directory)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip(directory: Path) -> None:
    path = weights_file(directory)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def foreign_weights(directory: Path) -> None:
    """A valid safetensors file of other tensors, with its checksum in the manifest."""
    path = weights_file(directory)
    save_file({"x": torch.zeros(3)}, path)
    note_weights(directory, path.read_bytes())


def not_safetensors(directory: Path) -> None:
    path = weights_file(directory)
    path.write_bytes(b"not what it should be" * 1000)
    note_weights(directory, path.read_bytes())


def note_weights(directory: Path, data: bytes) -> None:
    """Say in the manifest what the file of weights holds now."""
    known = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_manifest(directory, lambda d: d["weights"].update(known))


def manifest_text(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / MANIFEST).write_text(text) and None


def manifest_change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_manifest(directory, change)


def half_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text()[:500])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), r"there is no tensorize\.json in it"),
    "no weights": (lambda d: weights_file(d).unlink(), r"safetensors is missing"),
    "empty weights": (lambda d: cut(d, 0.0), "damaged or cut short"),
    "cut weights": (lambda d: cut(d, 0.7), "damaged or cut short"),
    "one bit": (flip, "damaged or cut short"),
    "not safetensors": (not_safetensors, r"safetensors cannot be read"),
    "foreign weights": (foreign_weights, r"safetensors cannot be read"),
    "half a manifest": (half_manifest, r"tensorize\.json is not valid JSON"),
    "not JSON": (manifest_text("PK\x03\x04"), "not valid JSON"),
    "a list": (manifest_text("[1, 2]"), "not a tensorize manifest"),
    "foreign JSON": (manifest_text('{"model_type": "gpt2"}'), "not a tensorize manifest"),
    "newer": (
        manifest_change(lambda d: d.update(format_version=3)),
        r"format version 3, and this tensorize reads up to 2\n.*upgrade",
    ),
    "no version": (manifest_change(lambda d: d.pop("format_version")), "is damaged"),
    "no sites": (manifest_change(lambda d: d.pop("sites")), "damaged: KeyError"),
    "bad spec": (
        manifest_change(lambda d: d["sites"][0]["spec"].update(ranks=[0])), "damaged: ValueError",
    ),
    "bad dtype": (
        manifest_change(lambda d: d["tensors"]["offset"].update(dtype="load")), "is no dtype",
    ),
    "other dtype": (
        manifest_change(lambda d: d["tensors"]["offset"].update(dtype="float16")),
        r"offset is float32 .* says float16",
    ),
    "bad alias": (
        manifest_change(lambda d: d["aliases"].update({"x": "offset"})), "damaged: ValueError",
    ),
    "no report": (manifest_change(lambda d: d.update(report={})), "damaged: TypeError"),
    "path": (
        manifest_change(lambda d: d["weights"].update(file="../../etc/passwd")),
        "not the name of a weights file",
    ),
    "a tensor less": (
        manifest_change(lambda d: d["tensors"].pop("offset")), "artefact has no offset",
    ),
    "a site less": (manifest_change(lambda d: d["sites"].clear()), "the model has no up.first"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_model_untouched(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    save(compressed_mlp(), tmp_path)
    damage(tmp_path)
    model = build(Mlp, seed=7).train()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, model)
    assert caught.value.way_out
    assert str(tmp_path) in str(caught.value)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert after[name].equal(value)
    assert model.training
    assert type(model.up) is nn.Linear
    assert "_tensorize" not in model.__dict__


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere", build(Mlp))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_report(tmp_path / "file")


class OtherMlp(nn.Module):
    pass


def widened(name: str) -> nn.Module:
    model = build(Mlp)
    if name == "up":
        model.up = nn.Linear(24, 65)
    else:
        model.down = nn.Linear(60, 12, bias=False)
    return model


def other_rank() -> nn.Module:
    model = build(Mlp)
    factorize(model, ["up.weight"], (64, 1), (1, 24), 6)
    return model


def other_kernel() -> nn.Module:
    model = build(Pixels)
    model.patches = nn.Conv2d(3, 16, (2, 8), stride=4)
    return model


def also_down() -> nn.Module:
    model = compressed_mlp()
    factorize(model, ["down.weight"], (12, 1), (1, 64), 3)
    return model


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "class": (lambda: build(OtherMlp), r"is of a .*Mlp, and the model passed is a .*OtherMlp"),
    "site's shape": (lambda: widened("up"), r"up\.weight has shape \(65, 24\) in the model"),
    "other shape": (lambda: widened("down"), r"down\.weight is a parameter of shape \(12, 60\)"),
    "rank": (other_rank, r"up\.weight is factorized as TTSpec.*\(6,\).* in the model"),
    "more factorized": (also_down, r"down\.weight is factorized in the model, and dense"),
    "no such module": (
        lambda: (m := build(Mlp), delattr(m, "up"))[0], "the model has no parameter up.weight",
    ),
    "more buffers": (
        lambda: (m := build(Mlp), m.register_buffer("extra", torch.ones(1)))[0],
        "the artefact has no extra",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_a_model_that_does_not_fit_is_left_alone(kind: str, tmp_path: Path) -> None:
    make, message = MISFITS[kind]
    save(compressed_mlp(), tmp_path)
    model = make()
    if kind == "class":
        model.__class__ = OtherMlp
    before, modules = dict(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, model)
    assert caught.value.way_out
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same_bits(after[name], before[name]) for name in before)
    assert [type(m) for m in model.modules()] == modules


def test_a_convolution_with_another_kernel_does_not_fit(tmp_path: Path) -> None:
    save(compressed_pixels(), tmp_path)
    with pytest.raises(CheckpointError, match=r"patches.weight has shape \(16, 3, 2, 8\)"):
        load(tmp_path, other_kernel())


def test_interrupt_while_filling_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = build(Recurrent)
    factorize(saved, ["out.weight"], (6, 1), (1, 8), 2)
    save(attach_report(saved), tmp_path)
    model, x = build(Recurrent, seed=4), torch.randn(2, 5, 8)
    before = model(x)
    monkeypatch.setattr(nn.Module, "eval", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, model)
    assert same_bits(model(x), before)
    assert type(model.out) is nn.Linear
