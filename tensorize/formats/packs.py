"""Packs that are kept: weights of few bits as codes of eight, made where they first run.

A pack is what a CPU multiplies by. It is no part of a model's state: it is kept as long as the
codes that it was made of, which stay beside it, and made again when these or their scales change.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize.formats.integers import Pack
from tensorize.ir.spec import Spec

# A graph holds this one operation, which looks at the codes whenever it runs.
library = torch.library.Library("tensorize", "FRAGMENT")
library.define("coded_linear(Tensor x, Tensor[] held, str contract, str spec) -> Tensor")
OPERATION = torch.ops.tensorize.coded_linear.default


@dataclass(frozen=True)
class _Kept:
    """Packs, and the tensors that they were made of: which, where, and how often written to."""

    packs: dict[str, list[Pack]]
    made_of: list[tuple[weakref.ref[Tensor], tuple[int, int]]]

    def is_of(self, held: Sequence[Tensor]) -> bool:
        pairs = zip(self.made_of, held, strict=True)
        return all(ref() is tensor and state == _state(tensor) for (ref, state), tensor in pairs)


_kept = WeakTensorKeyDictionary()


def packs_of(held: Sequence[Tensor], contract: str, make: Callable[[], list[Pack]]) -> list[Pack]:
    """The packs of what is held of a weight, for a side of it, which are made where there are none
    of just that."""
    found: _Kept | None = _kept.get(held[-1])
    if found is None or not found.is_of(held):
        made_of = [(weakref.ref(tensor), _state(tensor)) for tensor in held]
        found = _kept[held[-1]] = _Kept({}, made_of)
    if contract not in found.packs:
        found.packs[contract] = make()
    return found.packs[contract]


def forget(tensor: Tensor) -> None:
    """Let packs that were made of what ends with a tensor be made again."""
    _kept.pop(tensor, None)


def packed_bytes(held: Sequence[Tensor]) -> int:
    """What is kept of a weight now, beside what is held."""
    found: _Kept | None = _kept.get(held[-1])
    every = itertools.chain.from_iterable(found.packs.values()) if found is not None else ()
    return sum(pack.bytes for pack in every)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=4096)
def from_text(text: str) -> Spec:
    """The spec of a ``QuantizedSpec.text``."""
    return Spec.from_dict(json.loads(text))


@torch.library.register_fake("tensorize::coded_linear", lib=library)
def _(x: Tensor, held: list[Tensor], contract: str, spec: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], from_text(spec).shape[0 if contract == "columns" else 1])
