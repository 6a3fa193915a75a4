"""Files written at once: what a failure, a kill or another process leaves of them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorize.base import files
from tensorize.base.errors import TensorizeError
from tensorize.codegen.device import autotune
from tensorize.codegen.machine import rates, timed_orders
from tests.paths import ROOT

ADDED = 40
"""Records that each of two processes adds."""

# Each process adds to three files, one record at a time, then dies while it writes under a lock.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from tensorize.base import files
from tensorize.codegen.device import autotune
from tensorize.codegen.machine import timed_orders as orders
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work

folder, me, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(folder / f"ready{me}").touch()
while not all((folder / f"ready{k}").exists() for k in range(2)):
    time.sleep(0.001)
choice = autotune.Choice("forward", autotune.Tiles(), ratio=0.5)
for k in range(count):
    name = f"{me}.{k}"
    files.update_records(folder / "records.json", lambda kept: {**kept, name: k})
    orders.remember({name: (("x", 0), k)})
    work = Work((TTSpec.low_rank(64, 64, 1 + 2 * k + me),))
    autotune.keep(work, torch.float32, 16, "cpu", choice)
with files.locked(folder / "old"), files.replacing(folder / "old") as draft:
    draft.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where two processes did what ``SCRIPT`` says, both at once."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "old").write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORIZE_CACHE_DIR", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder), str(me), str(ADDED)],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for me in range(2)
        ]
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == -signal.SIGKILL, said
        autotune.forget()
        yield folder
    autotune.forget()


NAMES = {f"{me}.{k}" for me in range(2) for k in range(ADDED)}


def test_two_processes_lose_no_record(ended: Path) -> None:
    assert json.loads((ended / "records.json").read_text()).keys() == NAMES


def test_two_processes_lose_no_order(ended: Path) -> None:
    known = timed_orders.known()
    assert known.keys() == NAMES
    assert known["1.3"] == (("x", 0), 3)


def test_two_processes_lose_no_choice_of_a_kernel(ended: Path) -> None:
    ranks = sorted(spec.ranks[0] for spec in autotune.winners("cpu"))
    assert ranks == list(range(1, 2 * ADDED + 1))


def test_a_killed_process_leaves_the_old_file_and_no_lock(ended: Path) -> None:
    assert (ended / "old").read_text() == "old"
    assert [draft.read_text() for draft in files.drafts_of(ended / "old")] == ["ne", "ne"]
    with files.locked(ended / "old"):  # it would wait for ever
        files.write_at_once(ended / "old", "new")
    assert (ended / "old").read_text() == "new"


# ---------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("data", ["größer\n", b"\x00\xff"], ids=["text", "bytes"])
def test_what_is_written_is_read(data: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_at_once(path, "before")
    files.write_at_once(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["block", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(
    at: str, failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure("the disk is full")

    def write() -> None:
        with files.replacing(path) as draft:
            draft.write_text("ne")
            if at == "block":
                fail()

    path = tmp_path / "file"
    path.write_text("old")
    if at != "block":
        monkeypatch.setattr(os, at, fail)
    with pytest.raises(failure, match="the disk is full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole before it is seen, and its name in the folder after."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(file: int) -> None:
        mode = os.fstat(file).st_mode
        seen.append("folder" if stat.S_ISDIR(mode) else f"{os.fstat(file).st_size} bytes")
        fsync(file)

    def watched_replace(*paths: Path) -> None:
        seen.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write_at_once(tmp_path / "file", "12345")
    assert seen == ["5 bytes", "replace", "folder"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_usual_permissions(mask: int, tmp_path: Path) -> None:
    """Also those that safetensors writes, which makes files that only their owner may read."""
    before = os.umask(mask)
    try:
        files.write_at_once(tmp_path / "text", "text")
        with files.replacing(tmp_path / "tensors") as draft:
            save_file({"a": torch.zeros(1)}, draft)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        files.write_at_once(tmp_path / "file", "text")
    with pytest.raises(PermissionError):
        files.update_records(tmp_path / "file", dict)
    with pytest.raises(TensorizeError, match="Permission denied"):
        files.write_text(tmp_path / "file", "text")


def test_a_home_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known there; keeping something makes the folder, or fails as files do."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path / "none" / "yet"))
    assert timed_orders.known() == {}
    assert not (tmp_path / "none").exists()
    timed_orders.remember({"a": (("x", 0), 1)})
    assert timed_orders.known() == {"a": (("x", 0), 1)}
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path / "file"))
    assert timed_orders.known() == {}
    with pytest.raises(OSError, match="file"):
        timed_orders.remember({"a": (("x", 0), 1)})
    with pytest.raises(OSError, match="file"):
        rates.keep(rates.known())


# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_records_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(text, encoding="latin-1")
    assert files.read_records(path) == {}
    files.update_records(path, lambda kept: {**kept, "a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_change_that_fails_leaves_records_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    files.update_records(path, lambda kept: {**kept, "a": 1})
    with pytest.raises(ZeroDivisionError):
        files.update_records(path, lambda kept: {"b": 1 // 0})
    files.update_records(path, lambda kept: {**kept, "b": 2})  # it would wait for ever
    assert files.read_records(path) == {"a": 1, "b": 2}


def test_a_lock_keeps_threads_out_too(tmp_path: Path) -> None:
    inside = threading.Event()

    def enter() -> None:
        with files.locked(tmp_path / "file"):
            inside.set()

    other = threading.Thread(target=enter)
    with files.locked(tmp_path / "file"):
        other.start()
        assert not inside.wait(0.05)
    other.join(10)
    assert inside.is_set()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_told_and_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    files.update_records(tmp_path / "records.json", lambda kept: {"a": 1})
    assert files.read_records(tmp_path / "records.json") == {"a": 1}
    assert "cannot be locked" in caplog.text
