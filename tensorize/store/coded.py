"""Files of weights that are coded: what is in them, written and read.

A coded file is one of safetensors that holds an index, which says how each tensor is decoded, and
the coded bytes; it can be read without the manifest. A tensor is decoded when it is asked for, its
blocks in parallel.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from tensorize.base.records import BAD_DATA, parse, plain, record
from tensorize.base.tensorfile import Layout, Writer
from tensorize.base.tensors import raw_bytes
from tensorize.coding import groups
from tensorize.coding.groups import Group
from tensorize.coding.tensors import Coding, coder_of, decode, encode, encode_by, range_of
from tensorize.ir.budget import entry_bound
from tensorize.store.contents import dtype_of

_INDEX, _SIZE, _DATA = "tensorize.index", "tensorize.index_size", "tensorize.data"


@dataclass(frozen=True)
class CodedGroup:
    """Tensors whose codes are coded together: a matrix each, in the order of the group."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: Group

    @property
    def bytes(self) -> int:
        return self.group.bytes


@dataclass(frozen=True)
class CodedTensors:
    """Tensors as they are coded: alone, by name, and in groups, each with its bytes.

    ``known``: what else the manifest is to say of it. ``errors``: the largest error of an entry of
    those in groups, by name.
    """

    tensors: Mapping[str, tuple[Coding, bytes]]
    groups: Sequence[tuple[CodedGroup, bytes]] = ()
    known: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def as_bytes(self) -> dict[str, Tensor]:
        """What the file holds: the index, and the coded bytes one after the other."""
        index = {
            "tensors": {key: plain(coding) for key, (coding, _) in self.tensors.items()},
            "groups": [plain(group) for group, _ in self.groups],
        }
        text = torch.frombuffer(bytearray(json.dumps(index).encode()), dtype=torch.uint8)
        data = b"".join(part for _, part in (*self.tensors.values(), *self.groups))
        size = torch.tensor([len(text)])
        return {_INDEX: _bytes(zlib.compress(raw_bytes(text), 9)), _SIZE: size, _DATA: _bytes(data)}

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says: of every tensor its bound, and the error found."""
        alone = {
            key: {"bound": coding.bound, "found": coding.found}
            for key, (coding, _) in self.tensors.items()
        }
        together = {name: {"bound": None, "found": error} for name, error in self.errors.items()}
        return {**self.known, "tensors": alone | together}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return Layout.usual(self.as_bytes(), METADATA).size


Coder = Callable[[Mapping[str, Tensor]], CodedTensors]
"""What codes the tensors that are to be stored."""


def lossless(stored: Mapping[str, Tensor]) -> CodedTensors:
    """Every bit is kept."""
    return CodedTensors({key: encode(tensor) for key, tensor in stored.items()})


def within(error: float | str, by: str | None = None) -> Coder:
    """No entry is further from what it was than ``Budget(entry_error=)`` says.

    ``by`` another coder, of ``peers.PEERS``, wherever that keeps it.
    """
    value, relative = entry_bound(error)
    encoded = encode if by is None else partial(encode_by, by)

    def coder(stored: Mapping[str, Tensor]) -> CodedTensors:
        bounds = {k: value * range_of(t) if relative else value for k, t in stored.items()}
        found = {key: encoded(tensor, bounds[key]) for key, tensor in stored.items()}
        known: dict[str, Any] = {"entry_error": error}
        if by is not None:
            known |= {"coder": by, "own": [k for k, (c, _) in found.items() if not coder_of(c)]}
        return CodedTensors(found, known=known)

    return coder


METADATA = {"format": "pt"}
"""Of a file of weights: what transformers asks for."""

MOST_TEXT = 1 << 29
"""Bytes of an index that are read at most."""


class TensorFile(Protocol):
    """What is read of a file of weights."""

    def keys(self) -> Collection[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Index:
    tensors: Any
    groups: tuple[CodedGroup, ...]


class _CodedFile:
    """What is coded, by name; a group is kept from when the first of its tensors is asked for."""

    def __init__(self, file: Any) -> None:
        self._data = file.get_slice(_DATA)
        index = _index_of(file)
        parts = [*index.tensors.values(), *index.groups]
        starts = list(accumulate((part.bytes for part in parts), initial=0))
        if any(part.bytes < 0 for part in parts) or [starts[-1]] != self._data.get_shape():
            raise ValueError("the bytes are not those of what is coded")
        self._alone = dict(
            zip(index.tensors, zip(index.tensors.values(), starts, strict=False), strict=True)
        )
        self._together: dict[str, tuple[CodedGroup, int]] = {}
        for group, start in zip(index.groups, starts[len(self._alone) :], strict=False):
            self._together |= dict.fromkeys(group.names, (group, start))
        if self._alone.keys() & self._together.keys():
            raise ValueError("a tensor is there twice")
        self._decoded: dict[str, Tensor] = {}

    def keys(self) -> Collection[str]:
        return [*self._alone, *self._together]

    def get_tensor(self, name: str) -> Tensor:
        if name in self._alone:
            coding, start = self._alone[name]
            return decode(coding, self._part(start, coding.bytes))
        if name not in self._decoded:
            group, start = self._together[name]
            self._decoded |= _decoded(group, self._part(start, group.bytes))
        return self._decoded.pop(name)

    def blank(self) -> dict[str, Tensor]:
        """Every tensor, on meta."""
        alone = {name: (coding.dtype, coding.shape) for name, (coding, _) in self._alone.items()}
        for group, _ in self._together.values():
            alone |= {
                name: (dtype, shape)
                for name, dtype, shape in zip(group.names, group.dtypes, group.shapes, strict=True)
            }
        return {
            name: torch.empty(shape, dtype=dtype_of(dtype), device="meta")
            for name, (dtype, shape) in alone.items()
        }

    def _part(self, start: int, size: int) -> memoryview:
        return raw_bytes(self._data[start : start + size])


def _decoded(coded: CodedGroup, data: memoryview) -> dict[str, Tensor]:
    found = groups.decode(coded.group, data)
    each = zip(coded.names, coded.dtypes, coded.shapes, found, strict=True)
    return {name: matrix.to(dtype_of(dtype)).reshape(shape) for name, dtype, shape, matrix in each}


def _index_of(file: Any) -> _Index:
    """What a coded file says of itself."""
    size = int(file.get_tensor(_SIZE))
    if not 0 <= size <= MOST_TEXT:
        raise ValueError("it says nothing of what is coded")
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(raw_bytes(file.get_tensor(_INDEX)), size + 1)
        data = parse(text.decode())
        tensors = {name: record(Coding, coding) for name, coding in data["tensors"].items()}
        return _Index(tensors, tuple(record(CodedGroup, group) for group in data["groups"]))
    except (*BAD_DATA, zlib.error) as error:
        raise ValueError(f"how it is coded cannot be read: {error}") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """A file of weights, whether it is coded or not.

    Raises:
        OSError, SafetensorError, ValueError: it cannot be read, or is damaged; ``get_tensor``, too.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        yield _CodedFile(file) if _INDEX in {*file.keys()} else file


@dataclass(frozen=True)
class _Slice:
    """A tensor that is here, as safetensors shows one that is not."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return [*self.tensor.shape]

    def __getitem__(self, part: slice) -> Tensor:
        return self.tensor[part]


@dataclass(frozen=True)
class _Held:
    """What a coded file holds, read by somebody else."""

    tensors: Mapping[str, Tensor]

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.tensors[name])


def decoded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of files that another reader goes through, those of a coded one decoded.

    Raises:
        ValueError: what is coded is damaged, or not all there.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in (_INDEX, _SIZE, _DATA):
            held[name] = tensor.cpu()
        else:
            yield name, tensor
    if not held:
        return
    if len(held) < 3:
        raise ValueError(f"of a coded file there are {sorted(held)} alone")
    file = _CodedFile(_Held(held))
    for name in [*file.keys()]:
        yield name, file.get_tensor(name)


def is_coded(path: Path) -> bool:
    """Whether a file of safetensors holds coded bytes."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return _INDEX in {*file.keys()}


def write_decoded(path: Path, target: Path) -> None:
    """Write a coded file's tensors as a file that every reader of safetensors knows.

    Raises:
        OSError, SafetensorError, ValueError: it cannot be read, or is damaged.
    """
    with opened(path) as file:
        assert isinstance(file, _CodedFile)
        with Writer(target, Layout.usual(file.blank(), METADATA)) as writer:
            for name in [*file.keys()]:
                writer.put(name, file.get_tensor(name))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()
