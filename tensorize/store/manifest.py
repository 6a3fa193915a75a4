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
from tensorize.base.records import plain, record
from tensorize.ir.spec import NONLINEARITIES
from tensorize.reports.report import Report
from tensorize.store.contents import Contents, Entry, SiteRecord, dtype_of
from tensorize.version import __version__

FORMAT, FORMAT_VERSION = "tensorize", 1
MANIFEST = "tensorize.json"
WEIGHTS_NAME = re.compile(r"tensorize-[0-9a-f]{16}\.safetensors")
SAVE_AGAIN = "save the model again, or restore the directory from a copy"


@dataclass(frozen=True)
class Manifest:
    """What is read back: where the files are, what they hold, and of which model.

    ``model`` is what ``huggingface.describe`` says of it.
    """

    path: Path
    weights: Path
    sha256: str
    contents: Contents
    model: Mapping[str, Any]
    report: Report


def manifest_to_dict(
    contents: Contents, model: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """The manifest as JSON data; ``"weights"`` is filled in once the file of weights is written."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "weights": {},
        "model": model,
        **_contents_to_dict(contents),
        "report": report.to_dict(),
    }


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
    """What ``sites_to_list`` made."""
    sites = tuple(record(SiteRecord, site) for site in data)
    for site in sites:  # a name out of a file is looked up nowhere unless it is known
        if site.nonlinearity not in (None, *NONLINEARITIES):
            raise ValueError(f"{site.nonlinearity!r} is no non-linearity between factors")
    return sites


# ----------------------------------------------------------------------------------- read back


def _read_json(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's JSON, known to be ours and of a version that can be read."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
    if not isinstance(version, int) or version < 1:
        fail(path, f"is damaged: format_version is {version!r}", SAVE_AGAIN)
    if version > FORMAT_VERSION:
        by = data.get("versions") or {}
        fail(
            path,
            f"has format version {version}, and this tensorize reads up to {FORMAT_VERSION}",
            f"upgrade tensorize (the artefact was written by version {by.get('tensorize')})",
        )
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
        name = data["weights"]["file"]
        if not WEIGHTS_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a weights file")
        return Manifest(
            path=path,
            weights=directory / name,
            sha256=str(data["weights"]["sha256"]),
            contents=_contents_from_dict(data),
            model={**data["model"], "class": str(data["model"]["class"])},
            report=Report.from_dict(data["report"]),
        )


def _contents_from_dict(data: Mapping[str, Any]) -> Contents:
    entries = {key: record(Entry, entry) for key, entry in data["tensors"].items()}
    for name in (*(entry.dtype for entry in entries.values()), *data["transient"].values()):
        dtype_of(name)
    for key, first in (*data["aliases"].items(), *data["same_memory"].items()):
        if key not in entries or first not in entries:
            raise ValueError(f"{key!r} stands for {first!r}, and one of them is not there")
    sites = sites_from_list(data["sites"])
    return Contents(entries, data["aliases"], data["same_memory"], data["transient"], sites)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What wrong data raise when they are read becomes a CheckpointError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(path, f"is damaged: {type(error).__name__}: {error}", SAVE_AGAIN)


def fail(path: Path, cause: str, way_out: str) -> NoReturn:
    """Raises CheckpointError: what is wrong with a file, and what to do about it."""
    raise CheckpointError(f"{path} {cause}", way_out=way_out)
