"""Results kept beside the machine, the versions and the commit that they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tensorize

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Machine, versions and commit of this run."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        )
        return done.stdout.strip()

    return {
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": _version("triton"),
            "tensorize": tensorize.__version__,
        },
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Its name, with what tells apart those that virtual machines give the same name."""
    found = dict(
        (part.strip() for part in line.split(":", 1))
        for line in _lines("/proc/cpuinfo")
        if ":" in line
    )
    name = found.get("model name", platform.processor())
    known = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([name, *known])


def keep(name: str, results: Any) -> Path:
    """Write ``results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), "results": results}, indent=1) + "\n")
    return path


def kept(name: str) -> dict[str, Any]:
    """The results of ``results/<name>.json``; none where there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def cell_by_cell(
    name: str,
    cells: Sequence[object],
    measure: Callable[[Any], dict[str, Any]],
    summary: Callable[[dict[str, Any]], Any],
    *,
    threads: Sequence[int],
    resume: bool,
) -> None:
    """Measure every cell with so many threads; results are kept after each, so no run is in vain.

    Those of another processor, or with other threads, stay. ``resume``: so do cells that are there.
    """
    for count in threads:
        torch.set_num_threads(count)
        results, key = kept(name), f"{processor()}, {count} threads"
        known = results.get(key, {}).get("cells", {}) if resume else {}
        for cell in (cell for cell in cells if str(cell) not in known):
            found = known[str(cell)] = measure(cell)
            part = {"made_with": circumstances(), "summary": summary(known), "cells": known}
            keep(name, {**results, key: part})
            shown = ", ".join(f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, float))
            print(f"{count} threads, {cell}: {shown}", flush=True)
        print(f"{key}: {summary(known)}")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
