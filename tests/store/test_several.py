"""Several who save to one directory, and disks without room: one whole artefact in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tensorize.base.errors import CheckpointError
from tensorize.base.files import beside_others
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST
from tensorize.store.save import save
from tests.paths import ROOT
from tests.store.saved_models import (
    Mlp,
    assert_same_model,
    attach_report,
    build,
    compressed_gpt2,
    compressed_mlp,
    factorize,
    gpt2,
    output,
    same_bits,
)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], None]) -> None:
    """Before the next save puts its file number ``at`` in place, ``then`` happens."""
    replace, calls = os.replace, []

    def slow(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == at:
            then()
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("other", ["thread", "inside"])
def test_a_save_within_a_save(
    other: str, same: bool, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = compressed_mlp(), compressed_mlp(seed=0 if same else 1)

    def then() -> None:
        if other == "inside":
            save(second, tmp_path)
            return
        thread = threading.Thread(target=save, args=(second, tmp_path))
        thread.start()
        thread.join()

    interrupted(monkeypatch, at, then)
    save(first, tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), first)
    assert len(names(tmp_path)) == 2  # what the other one saved is taken away by the last


def test_one_leaves_what_another_has_not_named_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at once, whose manifests come in another order than their weights."""
    models = [compressed_mlp(seed=seed) for seed in range(3)]

    def then() -> None:
        interrupted(monkeypatch, 2, lambda: save(models[2], tmp_path))
        save(models[1], tmp_path)

    interrupted(monkeypatch, 2, then)
    save(models[0], tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), models[0])
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_configurations_are_those_of_the_manifest(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = compressed_gpt2(), attach_report(gpt2(seed=1))
    factorize(second, ["transformer.h.0.mlp.c_fc.weight"], (32, 1), (1, 128), 3)
    interrupted(monkeypatch, at, lambda: save(second, tmp_path))
    save(first, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["weights"] == manifest["weights"]["file"]
    assert_same_model(load(tmp_path), first)
    assert len(names(tmp_path)) == 5


SCRIPT = """
import sys
from pathlib import Path
from tensorize.store.save import save
from tests.store.saved_models import compressed_mlp
model = compressed_mlp(seed=int(sys.argv[2]))
for _ in range(20):
    save(model, sys.argv[1])
"""


def test_processes_that_save_at_once(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), str(seed)], cwd=ROOT)
        for seed in range(3)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    loaded = load(tmp_path, build(Mlp))
    assert any(same_bits(output(loaded), output(compressed_mlp(seed=seed))) for seed in range(3))
    assert len(names(tmp_path)) == 2


def test_only_one_is_alone(tmp_path: Path) -> None:
    with beside_others(tmp_path / "x") as first:
        with beside_others(tmp_path / "x") as second:
            assert not second()
        assert (tmp_path / "x.lock").exists()
        assert first()
    assert not (tmp_path / "x.lock").exists()
    with pytest.raises(ZeroDivisionError), beside_others(tmp_path / "x"):
        raise ZeroDivisionError
    assert not (tmp_path / "x.lock").exists()


# ------------------------------------------------------------------------------ disks without room

FULL = """
import resource, sys
from pathlib import Path
from tensorize.base.errors import CheckpointError
from tensorize.store.save import save
from tests.store.saved_models import compressed_mlp
model = compressed_mlp(seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(model, sys.argv[1])
except CheckpointError as error:
    print("refused", error.way_out)
"""


@pytest.mark.parametrize("room", [0, 2000, 5000])
def test_a_full_disk_leaves_the_old_artefact(room: int, tmp_path: Path) -> None:
    """Of the weights there is room for none, or for a part."""
    old = compressed_mlp()
    save(old, tmp_path)
    there = names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(room)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused choose a directory with room")
    assert_same_model(load(tmp_path, build(Mlp)), old)
    assert set(names(tmp_path)) >= set(there)
    assert not [name for name in names(tmp_path) if name.endswith((".tmp", ".lock"))]


def test_an_old_manifest_without_a_checksum_is_read(tmp_path: Path) -> None:
    model = compressed_mlp()
    save(model, tmp_path)
    path = tmp_path / MANIFEST
    data = json.loads(path.read_text())
    del data["sha256"]
    path.write_text(json.dumps(data))
    assert_same_model(load(tmp_path, build(Mlp)), model)
    for odd in ({"sha256x": "0"}, {"aliases": {"up.second.weight": "up.first.weight"}}):
        path.write_text(json.dumps({**data, **odd}))
        with pytest.raises(CheckpointError, match="is damaged"):
            load(tmp_path, build(Mlp))


def test_a_lock_is_no_part_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    save(attach_report(nn.Sequential(nn.Linear(2, 2)).eval()), tmp_path)
    assert len(names(tmp_path)) == 3
