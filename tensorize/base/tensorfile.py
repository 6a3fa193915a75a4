"""safetensors files written one tensor at a time, where the library's writer wants all at once.

The header says where every tensor lies, so it is written first, from shapes and dtypes alone; then
the tensors go to their places in any order. Laid out as ``Layout.usual`` does, a file is the same
byte for byte as the one that ``safetensors.torch.save_file`` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensorize.base.files import to_disk
from tensorize.base.tensors import raw_bytes

# In the order in which safetensors sorts them: the last ones come first in a file.
_CODES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_CODES)}
# What memory that torch makes is aligned to: how a matmul rounds may hang on it.
ALIGNMENT = 64
_PADDING = "padding."


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a file lies: ``places`` are byte ranges after the header."""

    header: bytes
    places: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + max((end for _, end in self.places.values()), default=0)

    @classmethod
    def usual(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
        """As safetensors lays tensors out: by dtype, then by name. They may be on meta.

        Raises:
            KeyError: the name of a dtype that safetensors does not know.
        """
        for tensor in tensors.values():
            if tensor.dtype not in _CODES:
                raise KeyError(str(tensor.dtype))
        order = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
        return _laid_out({name: tensors[name] for name in order}, metadata, 8)

    @classmethod
    def aligned(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
        """Every tensor at a multiple of ``ALIGNMENT``, so that a file can be mapped into memory.

        safetensors allows no holes: what is between tensors is a tensor of bytes of its own.
        """
        padded: dict[str, Tensor] = {}
        for count, (name, tensor) in enumerate(tensors.items()):
            padded[name] = tensor
            if rest := -_bytes_of(tensor) % ALIGNMENT:
                padded[f"{_PADDING}{count}"] = torch.empty(rest, dtype=torch.uint8, device="meta")
        return _laid_out(padded, metadata, ALIGNMENT)


def _laid_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], multiple: int) -> Layout:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name, tensor in tensors.items():
        places[name] = at, at + _bytes_of(tensor)
        at = places[name][1]
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(places[name]),
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return Layout(len(text).to_bytes(8, "little") + text, places)


def _bytes_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def is_padding(name: str) -> bool:
    """Whether a name in a file is of what lies between tensors."""
    return name.startswith(_PADDING)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class Writer:
    """A file of a known layout that is being filled, in any order.

    One that is there already, of the same layout, is gone on with.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = layout
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115
        try:
            self._file.truncate(layout.size)
            self._file.write(layout.header)
        except OSError:
            self.close()
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the shape and dtype that the layout was made for."""
        start, end = self._layout.places[name]
        data = raw_bytes(tensor)
        assert len(data) == end - start, name
        self._file.seek(len(self._layout.header) + start)
        self._file.write(data)

    def flush(self) -> None:
        """Come back when all that was put is on the disk."""
        to_disk(self._file)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
