"""Files of weights that are coded: what is in them, written and read.

A coded file is one of safetensors whose tensors are bytes; its metadata say how each is decoded, so
that it can be read without the manifest. A tensor is decoded when it is asked for, its blocks in
parallel.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from tensorize.base.records import BAD_DATA, parse, plain, record
from tensorize.base.tensorfile import Layout, Writer
from tensorize.base.tensors import raw_bytes
from tensorize.coding.tensors import Coding, decode, encode, range_of
from tensorize.ir.budget import entry_bound

_CODING = "tensorize_coding"


@dataclass(frozen=True)
class CodedTensors:
    """Tensors by name, as they are coded. ``known``: what else the manifest is to say of it."""

    tensors: Mapping[str, tuple[Coding, bytes]]
    known: Mapping[str, Any] = field(default_factory=dict)

    def as_bytes(self) -> dict[str, Tensor]:
        """The coded bytes as tensors."""
        return {key: _bytes(data) for key, (_, data) in self.tensors.items()}

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return {
            _CODING: json.dumps({key: plain(coding) for key, (coding, _) in self.tensors.items()})
        }

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says: of every tensor its bytes, its bound, and the error found."""
        each = {
            key: {"bytes": coding.bytes, "bound": coding.bound, "found": coding.found}
            for key, (coding, _) in self.tensors.items()
        }
        return {**self.known, "tensors": each}


Coder = Callable[[Mapping[str, Tensor]], CodedTensors]
"""What codes the tensors that are to be stored."""


def lossless(stored: Mapping[str, Tensor]) -> CodedTensors:
    """Every bit is kept."""
    return CodedTensors({key: encode(tensor) for key, tensor in stored.items()})


def within(error: float | str) -> Coder:
    """No entry is further from what it was than ``Budget(entry_error=)`` says."""
    value, relative = entry_bound(error)

    def coder(stored: Mapping[str, Tensor]) -> CodedTensors:
        bounds = {k: value * range_of(t) if relative else value for k, t in stored.items()}
        return CodedTensors(
            {key: encode(tensor, bounds[key]) for key, tensor in stored.items()},
            {"entry_error": error},
        )

    return coder


class TensorFile(Protocol):
    """What is read of a file of weights."""

    def keys(self) -> Collection[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _CodedFile:
    file: Any
    codings: Mapping[str, Coding]

    def keys(self) -> Collection[str]:
        return self.file.keys()

    def get_tensor(self, name: str) -> Tensor:
        return decode(self.codings[name], raw_bytes(self.file.get_tensor(name)))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """A file of weights, whether it is coded or not.

    Raises:
        OSError, SafetensorError, ValueError: it cannot be read, or is damaged; ``get_tensor``, too.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        codings = _codings(file)
        yield file if codings is None else _CodedFile(file, codings)


def is_coded(path: Path) -> bool:
    """Whether a file of safetensors holds coded bytes."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return _CODING in (file.metadata() or {})


def write_decoded(path: Path, target: Path) -> None:
    """Write a coded file's tensors as a file that every reader of safetensors knows.

    Raises:
        OSError, SafetensorError, ValueError: it cannot be read, or is damaged.
    """
    with opened(path) as file:
        assert isinstance(file, _CodedFile)
        blank = {
            name: torch.empty(coding.shape, dtype=getattr(torch, coding.dtype), device="meta")
            for name, coding in file.codings.items()
        }
        with Writer(target, Layout.usual(blank, {"format": "pt"})) as writer:
            for name in file.keys():
                writer.put(name, file.get_tensor(name))


def _codings(file: Any) -> dict[str, Coding] | None:
    text = (file.metadata() or {}).get(_CODING)
    if text is None:
        return None
    try:
        found = {name: record(Coding, data) for name, data in parse(text).items()}
    except BAD_DATA as error:
        raise ValueError(f"how it is coded cannot be read: {error}") from error
    if found.keys() != {*file.keys()}:
        raise ValueError("what is coded is not what is said to be")
    return found


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()
