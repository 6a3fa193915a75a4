"""Files that are written at once, and records that several processes may add to.

A file is written as a draft beside it, put on the disk, and given its name: whoever reads sees the
old file or the new one, also after a crash of the machine. The draft's name is its process's own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tensorize.base.errors import TensorizeError

if sys.platform != "win32":
    import fcntl

    _EXCLUSIVE = fcntl.LOCK_EX

log = logging.getLogger("tensorize")

# What flock says on disks over a network that have no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}

# What a disk says that has no room, or no room for somebody.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def is_full(error: OSError) -> bool:
    """Whether it says that a disk has no room."""
    return error.errno in _FULL


# ---------------------------------------------------------------------------------- one file


def write_at_once(path: Path, data: str | bytes) -> None:
    """Write a file at once; text is UTF-8.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    with replacing(path) as draft:
        if isinstance(data, str):
            draft.write_text(data, encoding="utf-8")
        else:
            draft.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write into; after the block it takes the place of ``path``, unless that raised.

    It gets the usual permissions, whatever the block made them.
    """
    with draft_of(path) as draft:
        usual = draft.stat().st_mode
        yield draft
        if draft.stat().st_mode != usual:  # not every disk lets one ask
            draft.chmod(usual)
        into_place(draft, path)


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, that is not there after the block (it may be moved)."""
    draft = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    draft.touch(exist_ok=False)
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):  # what went wrong before tells more
            draft.unlink()


def drafts_of(path: Path) -> list[Path]:
    """The drafts that are there, such as killed processes left."""
    start = f".{path.name}-"
    return [p for p in path.parent.glob(".*.tmp") if p.name.startswith(start)]


def into_place(draft: Path, target: Path) -> None:
    """Give a finished file its name, so that it survives a crash of the machine."""
    with open(draft, "r+b") as file:
        to_disk(file)
    os.replace(draft, target)
    with contextlib.suppress(OSError):  # not every system can open a directory
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_disk(file: IO[bytes]) -> None:
    """Come back when all that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


# ----------------------------------------------------------------------- a file that a user names


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_at_once`` for a path of a user's, whose failures say what to do.

    Raises:
        TensorizeError: the directory does not exist or cannot be written.
    """
    target = writable(path)
    try:
        write_at_once(target, text)
    except OSError as error:
        raise TensorizeError(
            f"{target} cannot be written: {error.strerror or error}",
            way_out="choose a file in a directory that you may write to",
        ) from error


def writable(path: str | os.PathLike[str]) -> Path:
    """The path of a file to write, in a directory that exists.

    Raises:
        TensorizeError: the directory does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise TensorizeError(
            f"{target} cannot be written: the directory {target.parent} does not exist",
            way_out="create it first, or choose another path",
        )
    return target


# ------------------------------------------------------------------------------------ records


def of_this_machine(kind: str, identity: str) -> Path:
    """Where records of some kind are kept, of what ``identity`` names: a device, and versions."""
    home = os.environ.get("TENSORIZE_CACHE_DIR") or Path.home() / ".cache" / "tensorize"
    return Path(home) / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def read_records(path: Path) -> dict[str, Any]:
    """What a JSON file keeps by name; nothing where there is none or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update_records(path: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace the records of a JSON file by what ``change`` makes of them, under its lock.

    The directory is made where there is none.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        write_at_once(path, json.dumps(change(read_records(path)), indent=1))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads out that ask for the same file, which need not exist.

    The lock is on ``<name>.lock`` beside it, which stays, and ends with the process that holds it;
    it is not to be asked for again inside the block. Windows has none: there, of two that read,
    change and replace at once, the last one wins.

    Raises:
        OSError: there is no such directory, or it cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    side = _open_side(path.with_name(f"{path.name}.lock"))
    held = False
    try:
        held = _flocked(side, path)
        yield
    finally:
        if held:  # a process forked meanwhile would go on holding it
            fcntl.flock(side, fcntl.LOCK_UN)
        os.close(side)


@contextlib.contextmanager
def beside_others(path: Path) -> Iterator[Callable[[], bool]]:
    """Be one of several processes and threads that work on the same thing; nobody waits.

    The block gets a function that says whether nobody else is in such a block; where it says so,
    nobody comes in until the end, and it is to be called last. The lock is on ``<name>.lock``,
    which the last one takes away. Where there are no locks, everybody is alone.

    Raises:
        OSError: there is no such directory, or it cannot be written.
    """
    if sys.platform == "win32":
        yield lambda: True
        return
    place = path.with_name(f"{path.name}.lock")
    while True:
        side = _open_side(place)
        held = _flocked(side, path, fcntl.LOCK_SH)
        if not held or _is_at(side, place):  # else the last one took it away meanwhile
            break
        os.close(side)
    alone = False

    def is_alone() -> bool:
        nonlocal alone
        alone = not held or _flocked(side, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return alone

    try:
        yield is_alone
    finally:
        with contextlib.suppress(OSError):  # what went wrong before tells more
            if alone or is_alone():
                place.unlink()
        os.close(side)


def _is_at(side: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(side), os.stat(place))
    except FileNotFoundError:
        return False


def _flocked(side: int, path: Path, how: int = _EXCLUSIVE) -> bool:
    """Get the lock; False where it is another's and not to be waited for, or, with a warning, where
    the disk has none."""
    try:
        fcntl.flock(side, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lost = "what another process writes just now may be lost"
        log.warning("%s cannot be locked (%s): %s", path, error.strerror, lost)
        return False
    return True


def _open_side(side: Path) -> int:
    try:
        return os.open(side, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not side.exists():
            raise
        return os.open(side, os.O_RDONLY)  # of another user, in a folder that is shared
