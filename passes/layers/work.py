"""Tensors and records on disk that a run goes on with, each there at once or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tensorize.base.files import replacing, write_at_once
from tensorize.base.tensorfile import Layout, Writer, is_padding

_TENSORS, _RECORD = ".safetensors", ".json"


def named_by(*values: Any) -> str:
    """A name for what follows from plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Work:
    """A folder of what a run has finished, by name.

    A file has its name when all of it is on the disk: what is there is whole.
    """

    folder: Path

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def put(self, name: str, **tensors: Tensor) -> None:
        """Keep tensors under a name, in place of what was there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        layout = Layout.aligned(whole, {})
        with replacing(self._path(name)) as draft, Writer(draft, layout) as file:
            for key, tensor in whole.items():
                file.put(key, tensor)

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors that were kept; the system reads what is asked for of them."""
        with safe_open(self._path(name), framework="pt", device="cpu") as file:
            names = [key for key in file.keys() if not is_padding(key)]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in names}

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep a record of plain values."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_at_once(self.folder / f"{name}{_RECORD}", json.dumps(record))

    def noted(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}{_RECORD}"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_TENSORS}"
