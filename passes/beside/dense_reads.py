"""See whether a model with factors still reads a dense weight that something holds aside."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensorize.base.tensors import is_wrapped, lies_in_memory


@dataclass(frozen=True)
class Memory:
    """The addresses of a weight, as long as its storage is alive: it is not held here."""

    name: str
    storage: StorageWeakRef
    first: int
    end: int


def memory_of(weights: Mapping[str, Tensor]) -> tuple[Memory, ...]:
    """Where dense weights are."""
    return tuple(
        Memory(name, StorageWeakRef(weight.untyped_storage()), *_addresses(weight))
        for name, weight in weights.items()
        if lies_in_memory(weight) and not weight.is_meta
    )


def _addresses(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class DenseReads(TorchFunctionMode):
    """Notes in ``seen``, by weight, a function that reads its memory.

    Args:
        model: its own parameters and buffers, and what derives from them, may be read.
        memory: of the dense weights that it is to do without.
    """

    def __init__(self, model: nn.Module, memory: Iterable[Memory]) -> None:
        super().__init__()
        self.seen: dict[str, str] = {}
        alive = [place for place in memory if not place.storage.expired()]
        self._memory = sorted(alive, key=lambda place: place.first)
        self._firsts = [place.first for place in self._memory]
        own: Iterable[Tensor] = (*model.parameters(), *model.buffers())
        self._own = {id(tensor): tensor for tensor in own}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return result  # asked for a shape, a dtype, a flag
        given = pytree.tree_leaves((args, kwargs))
        read = [name for leaf in given if (name := self._read(leaf)) is not None]
        self.seen |= dict.fromkeys(read, getattr(func, "__name__", str(func)))
        if not read and func is not torch.from_numpy:
            self._own |= {id(leaf): leaf for leaf in made if self._read(leaf) is not None}
        return result

    def _read(self, value: Any) -> str | None:
        """The weight whose memory a tensor reads that is none of the model's own."""
        if type(value) not in (Tensor, nn.Parameter) or id(value) in self._own:
            return None
        if value.layout != torch.strided or value.is_meta or is_wrapped(value):
            return None
        if not value.numel():
            return None
        first, end = _addresses(value)
        place = self._memory[bisect.bisect_left(self._firsts, end) - 1] if self._memory else None
        return place.name if place is not None and place.first < end and first < place.end else None
