"""The manifest of an artefact: what a model holds, as data, written to JSON and read back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tensorize.base.errors import CheckpointError
from tensorize.base.records import BAD_DATA, checksum, parse, plain, record
from tensorize.reports.report import Report
from tensorize.store import checks
from tensorize.store.contents import Contents, Entry, SiteRecord
from tensorize.version import __version__

FORMAT, FORMAT_VERSION = "tensorize", 2
PLAIN_VERSION = 1
"""The format version of an artefact whose weights are not coded: older releases read it too."""
MANIFEST = "tensorize.json"
WEIGHTS_NAME = re.compile(r"tensorize-[0-9a-f]{16}\.safetensors")
SAVE_AGAIN = "save the model again, or restore the directory from a copy"
_CHECKSUM = "sha256"
# Those of manifests from before there was a checksum.
_KEYS = {"format", "format_version", "versions", "weights", "model", "report"}
_KEYS |= {"sites", "tensors", "aliases", "same_memory", "transient"}
MOST_TEXT = 1 << 29
"""Bytes of a manifest that are read at most."""


@dataclass(frozen=True)
class Manifest:
    """What is read back: where the files are, what they hold, and of which model.

    ``model`` is what ``huggingface.describe`` says of it; ``guard`` what its checks know, where it
    was guarded.
    """

    path: Path
    weights: Path
    sha256: str
    bytes: int
    contents: Contents
    model: Mapping[str, Any]
    report: Report
    guard: Mapping[str, Any] | None = None


def manifest_to_dict(
    contents: Contents, model: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """The manifest as JSON data; ``"weights"`` is filled in once the file of weights is written,
    and then ``signed`` makes the text of the file."""
    return {
        "format": FORMAT,
        "format_version": PLAIN_VERSION,
        "versions": _versions(),
        "weights": {},
        "model": model,
        **_contents_to_dict(contents),
        "report": report.to_dict(),
    }


def signed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with a checksum over all of it."""
    data = json.loads(json.dumps(manifest))
    return json.dumps({**data, _CHECKSUM: checksum(data)}, indent=1)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "tensorize": __version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "safetensors", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _contents_to_dict(contents: Contents) -> dict[str, Any]:
    return {
        "sites": sites_to_list(contents.sites),
        "tensors": {key: _given(entry) for key, entry in contents.entries.items()},
        "aliases": dict(contents.aliases),
        "same_memory": dict(contents.same_memory),
        "transient": dict(contents.transient),
    }


def sites_to_list(sites: Iterable[SiteRecord]) -> list[dict[str, Any]]:
    """Site records as JSON data."""
    return [_given(site) for site in sites]


def _given(value: SiteRecord | Entry) -> dict[str, Any]:
    return {name: item for name, item in plain(value).items() if item is not None}


def sites_from_list(data: Iterable[Mapping[str, Any]]) -> tuple[SiteRecord, ...]:
    """What ``sites_to_list`` made, checked."""
    sites = tuple(record(SiteRecord, site) for site in data)
    checks.check_sites(sites)
    return sites


# ----------------------------------------------------------------------------------- read back


def _read_json(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's JSON, known to be ours and of a version that can be read."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MOST_TEXT:
            fail(path, f"is larger than {MOST_TEXT} bytes, and no manifest", SAVE_AGAIN)
        data = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f"there is no {MANIFEST} in it" if directory.is_dir() else "no such directory"
        raise CheckpointError(
            f"{directory} holds no tensorize artefact: {missing}",
            way_out="check the path; tensorize.save(model, directory) writes an artefact",
        ) from error
    except OSError as error:
        fail(path, f"cannot be read: {error.strerror or error}", "check its permissions")
    except ValueError as error:
        fail(path, f"is not valid JSON, it is damaged or cut short: {error}", SAVE_AGAIN)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        fail(path, "is not a tensorize manifest", "check the path")
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        fail(path, f"is damaged: format_version is {version!r}", SAVE_AGAIN)
    if version > FORMAT_VERSION:
        by = data.get("versions")
        written = by.get("tensorize") if isinstance(by, dict) else None
        fail(
            path,
            f"has format version {version}, and this tensorize reads up to {FORMAT_VERSION}",
            f"upgrade tensorize (the artefact was written by version {written})",
        )
    signature = data.pop(_CHECKSUM, None)
    if checksum(data) != signature if signature is not None else data.keys() - _KEYS:
        fail(path, "is damaged: its content is not what its sha256 says", SAVE_AGAIN)
    return path, data


def read_report(directory: str | os.PathLike[str]) -> Report:
    """The report of a saved model; reads the manifest only.

    Raises:
        CheckpointError: there is no manifest, or it is foreign, damaged or too new.
    """
    path, data = _read_json(Path(directory))
    with damage_named(path):
        return Report.from_dict(data["report"])


def read_manifest(directory: Path) -> Manifest:
    """All that the manifest in a directory says.

    Raises:
        CheckpointError: there is no manifest, or it is foreign, damaged or too new.
    """
    path, data = _read_json(directory)
    with damage_named(path):
        file = record(_File, data["weights"])
        if not WEIGHTS_NAME.fullmatch(file.file):
            raise ValueError(f"{file.file!r} is not the name of a weights file")
        checks.check_model(data["model"])
        return Manifest(
            path=path,
            weights=directory / file.file,
            sha256=file.sha256,
            bytes=file.bytes,
            contents=_contents_from_dict(data, file.bytes),
            model=data["model"],
            report=Report.from_dict(data["report"]),
            guard=data.get("guard"),
        )


@dataclass(frozen=True)
class _File:
    file: str
    sha256: str
    bytes: int


def _contents_from_dict(data: Mapping[str, Any], size: int) -> Contents:
    entries = {key: record(Entry, entry) for key, entry in data["tensors"].items()}
    sites = sites_from_list(data["sites"])
    contents = Contents(entries, data["aliases"], data["same_memory"], data["transient"], sites)
    checks.check_contents(contents, size, coded=data.get("coding") is not None)
    return contents


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What wrong data raise when they are read becomes a CheckpointError that names the file."""
    try:
        yield
    except BAD_DATA as error:
        fail(path, f"is damaged: {type(error).__name__}: {error}", SAVE_AGAIN)


def fail(path: Path, cause: str, way_out: str) -> NoReturn:
    """Raises CheckpointError: what is wrong with a file, and what to do about it."""
    raise CheckpointError(f"{path} {cause}", way_out=way_out)
