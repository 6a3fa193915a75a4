"""What a run of a model may change of it: kept before, and put back after, where it did change.

Nothing is copied beforehand. While a model runs, torch's operations are watched (``watching``): the
first one that writes into a tensor of the model has its memory copied just before. So a tensor that
nothing writes to is neither read nor written, be it mapped from a file, expanded, on meta or saved
for a backward pass that is still to come.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._autograd import _unsafe_set_version_counter
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.base.sharded import resharded
from tensorize.base.tensors import plain_parts

_CONTAINERS = (dict, OrderedDict, list, set)
_kept: ContextVar[tuple[Kept, ...]] = ContextVar("kept", default=())


class Kept:
    """The state of a model's modules and tensors, but for what the values of ``but`` become."""

    def __init__(self, model: nn.Module, but: Collection[Tensor] = ()) -> None:
        self._modules = [(m, type(m), _Attributes(vars(m))) for m in model.modules()]
        left = {id(tensor) for tensor in but}
        found = {id(t): t for _, _, state in self._modules for t in state.tensors}
        self._tensors = {key: _Held(t) for key, t in found.items() if key not in left}
        grads = [held.grad for held in self._tensors.values() if held.grad is not None]
        parts = [part for t in (*found.values(), *grads) for part in _parts(t)]
        skipped = {_place(part) for tensor in but for part in _parts(tensor)}
        self._storages = {_place(p): p.untyped_storage() for p in parts if _place(p) not in skipped}
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._generators = [
            (g, g.get_state()) for _, _, state in self._modules for g in state.generators
        ]

    def note_write(self, place: int) -> None:
        """Something is about to write into memory: it is copied if it is the model's."""
        if place in self._storages and place not in self._copies:
            self._copies[place] = self._storages[place].clone()

    def written(self, tensor: Tensor) -> bool:
        """Whether anything wrote into a tensor of the model, or gave it other memory."""
        held = self._tensors.get(id(tensor))
        return held is not None and (held.moved or self._wrote(held))

    def _wrote(self, held: _Held) -> bool:
        return any(place in self._copies for place in held.places)

    def put_back(self) -> None:
        """Everything as it was. What is as it was is not written to."""
        for module, kind, state in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            state.put_back()
        for place, copy in self._copies.items():
            _fill(self._storages[place], copy)
        for held in self._tensors.values():
            held.put_back(self._wrote(held))
        for generator, before in self._generators:
            if not torch.equal(generator.get_state(), before):
                generator.set_state(before)


class _Attributes:
    """The attributes of a module, and what its containers hold."""

    def __init__(self, live: dict[str, Any]) -> None:
        self._contents = [(live, dict(live))]
        values = list(live.values())
        for value in live.values():
            if type(value) in _CONTAINERS:
                self._contents.append((value, type(value)(value)))
                values += value.values() if isinstance(value, dict) else value
        self.tensors = [value for value in values if isinstance(value, Tensor)]
        self.generators = [value for value in values if isinstance(value, torch.Generator)]

    def put_back(self) -> None:
        for live, before in self._contents:
            if not _same(live, before):
                live.clear()
                live.extend(before) if isinstance(live, list) else live.update(before)


def _same(live: Any, before: Any) -> bool:
    """Whether a container holds the very same objects, in the same order."""
    if len(live) != len(before):
        return False
    if isinstance(live, set):
        return live == before
    if isinstance(live, dict):
        return all(map(is_, live, before)) and all(map(is_, live.values(), before.values()))
    return all(map(is_, live, before))


class _Held:
    """A tensor of the model: where its values lie, its gradient, its count of writes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.grad = tensor, tensor.grad if tensor.is_leaf else None
        self._asks, self._alias = tensor.requires_grad, None
        self.places = tuple(_place(part) for part in _parts(tensor))
        plain = len(self.places) == 1 and _is_strided(tensor)
        if plain:
            self._alias = tensor.detach()
        self._version = tensor._version if plain and not tensor.is_inference() else None

    @property
    def moved(self) -> bool:
        """Whether its values lie elsewhere by now: its ``.data`` was set."""
        return self._alias is not None and _layout(self.tensor) != _layout(self._alias)

    def put_back(self, written: bool) -> None:
        tensor = self.tensor
        if self._alias is not None and self.moved:
            tensor.data = self._alias
        if tensor.is_leaf and tensor.requires_grad != self._asks:
            tensor.requires_grad_(self._asks)
        if tensor.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad
        if written and self._version is not None:  # the values are those of then
            _unsafe_set_version_counter((tensor,), (self._version,))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return _place(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that a tensor is made of."""
    for part in plain_parts(tensor):
        if part.layout == torch.sparse_coo:
            yield from (part._indices(), part._values())
        elif _is_strided(part) and not is_lazy(part):
            yield part


def _place(part: Tensor) -> int:
    """What tells the memory of one tensor from another's."""
    return part.untyped_storage()._cdata


def _fill(storage: torch.UntypedStorage, before: torch.UntypedStorage) -> None:
    """Give memory the values of before, if they are others."""
    if storage.nbytes() != before.nbytes():
        storage.resize_(before.nbytes())
    elif torch.equal(*(_as_bytes(each) for each in (storage, before))):
        return
    storage.copy_(before)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# ------------------------------------------------------------------------------------ while it runs


@contextlib.contextmanager
def keeping(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[Kept]:
    """What runs of the model change in here is put back, but for the values of ``but``.

    Runs are to be ``watching``. Random numbers go on from where they were.
    """
    numbers, numpys = random.getstate(), np.random.get_state()
    resharded(model)
    kept = Kept(model, but)
    token = _kept.set((*_kept.get(), kept))
    try:
        with torch.random.fork_rng():
            yield kept
    finally:
        _kept.reset(token)
        resharded(model)
        kept.put_back()
        random.setstate(numbers)
        np.random.set_state(numpys)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """What is written in here into what is kept is put back later."""
    kept = _kept.get()
    with _Writes(kept) if kept else contextlib.nullcontext():
        yield


class _Writes(TorchDispatchMode):
    """Tells of every write into memory, just before it happens."""

    supports_higher_order_operators = True

    def __init__(self, kept: tuple[Kept, ...]) -> None:
        super().__init__()
        self._kept = kept

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled runs compiled, here and in other threads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, name in _written_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self._note(tensor)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        for part in _parts(tensor):
            for kept in self._kept:
                kept.note_write(_place(part))


_ARGUMENTS: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes into."""
    known = _ARGUMENTS.get(func)
    if known is None:
        plain = isinstance(func, torch._ops.OpOverload)
        arguments = enumerate(func._schema.arguments if plain else ())
        written = ((k, a.name) for k, a in arguments if a.alias_info and a.alias_info.is_write)
        known = _ARGUMENTS[func] = tuple(written)
    return known
