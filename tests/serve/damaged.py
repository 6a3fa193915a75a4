"""Copies of folders that are not whole, or hold what an engine cannot run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tensorize.base.records import checksum


def without(directory: Path, key: str, target: Path, *, manifest: bool = True) -> Path:
    """A copy of a folder whose file lacks a tensor."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    if not manifest:
        (target / "tensorize.json").unlink()
    return target


def with_site(directory: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a folder in whose configuration one weight is another."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    noted = config["quantization_config"]
    site = next(s for s in noted["sites"] if s["names"] == ["model.layers.0.mlp.down_proj.weight"])
    change(site)
    noted["sha256"] = checksum({name: noted[name] for name in ("sites", "aliases")})
    (target / "config.json").write_text(json.dumps(config))
    return target


def renamed(site: dict[str, Any]) -> None:
    site["names"] = ["model.layers.0.mlp.dawn_proj.weight"]


def bent(site: dict[str, Any]) -> None:
    site["nonlinearity"] = "silu"
