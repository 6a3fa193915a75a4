"""What an artefact holds: every parameter and buffer, once, and the weights' records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensorize.base.errors import CheckpointError
from tensorize.base.sharded import is_first_rank, is_sharded, whole
from tensorize.ir.spec import Spec
from tensorize.weight.install import factored, turned_spec
from tensorize.weight.lazy import FactoredWeight

PARAMETER, BUFFER = "parameter", "buffer"
_PLAIN_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)


@dataclass(frozen=True)
class Entry:
    """One entry of the state dict. ``stride`` is given where the tensor is not contiguous."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SiteRecord:
    """One factorized parameter, under all of its names.

    ``shape`` is the parameter's own (a convolution's has more axes than the matrix), and so is the
    ``spec``, whichever way its module holds the cores. ``nonlinearity``: what is between them.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    spec: Spec
    nonlinearity: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a model holds, told without its values.

    ``aliases``: key → the first key of the same tensor object. ``same_memory``: key → the key of
    another tensor object on the very same memory. ``transient``: dtypes of the floating-point
    buffers that are no part of the state dict.
    """

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    same_memory: Mapping[str, str]
    transient: Mapping[str, str]
    sites: tuple[SiteRecord, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``, as ``dtype_of`` reads it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


# ------------------------------------------------------------------------- what a model holds


@dataclass(frozen=True)
class Slot:
    """A place in a model that holds one entry of its state dict."""

    key: str
    module: nn.Module
    leaf: str
    kind: str

    @property
    def tensor(self) -> Tensor:
        held = self.module._parameters if self.kind == PARAMETER else self.module._buffers
        tensor = held[self.leaf]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        if self.kind == PARAMETER:
            # Not straight into _parameters: recurrent layers keep a list of their weights beside.
            setattr(self.module, self.leaf, tensor)
        else:  # a buffer may be some module's parameter as well, and must stay a buffer here
            self.module._buffers[self.leaf] = tensor


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every parameter and persistent buffer, by its state-dict key and in that order."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(f"{prefix}{leaf}", module, leaf, PARAMETER)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield Slot(f"{prefix}{leaf}", module, leaf, BUFFER)


def transient_buffers(model: nn.Module) -> Iterator[Slot]:
    """Every buffer that is no part of the state dict."""
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(leaf) is not None:
                yield Slot(f"{path}.{leaf}" if path else leaf, module, leaf, BUFFER)


def contents_of(model: nn.Module, *, on_meta: bool = False) -> tuple[Contents, dict[str, Tensor]]:
    """The description of a model's tensors, and those to store, contiguous and each once.

    Of a sharded model every process is to ask; the first one gets the tensors, put together on
    the CPU one by one, and the others none.

    ``on_meta``: the model has no values yet, and nor have the tensors to store.
    """
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    same_memory: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    objects: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    _check_no_extra_state(model)
    for slot in slots_of(model):
        key, tensor = slot.key, slot.tensor
        if not on_meta:
            _check_storable(key, tensor)
        entries[key] = _entry_of(slot)
        first = objects.setdefault(id(tensor), key)
        if first != key:
            aliases[key] = first
            continue
        if on_meta:
            stored[key] = tensor
            continue
        if is_sharded(tensor):
            gathered = whole(tensor.detach())
            if is_first_rank():
                stored[key] = gathered.cpu().contiguous()
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = memory.setdefault(place, key) if tensor.numel() else key
        if first != key:
            same_memory[key] = first
            continue
        flat = tensor.detach().contiguous()
        if flat.untyped_storage().data_ptr() in storages:  # safetensors refuses what overlaps
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        stored[key] = flat
    transient = {
        slot.key: dtype_name(slot.tensor.dtype)
        for slot in transient_buffers(model)
        if slot.tensor.is_floating_point()
    }
    return Contents(entries, aliases, same_memory, transient, site_records(model)), stored


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Key → first key of the same parameter."""
    first: dict[int, str] = {}
    keys = [(slot.key, id(slot.tensor)) for slot in slots_of(model) if slot.kind == PARAMETER]
    return {key: first[i] for key, i in keys if first.setdefault(i, key) != key}


def _check_storable(key: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise CheckpointError(
            "the parameter is not initialized yet", site=key, way_out="run the model once"
        )
    if tensor.is_meta:
        raise CheckpointError(
            "the tensor is on the meta device: it has no values to save",
            site=key,
            way_out="load the weights first",
        )
    if is_sharded(tensor):
        return
    # A subclass that dispatches for itself (a quantized tensor) has no plain memory.
    own_dispatch = getattr(type(tensor), "__torch_dispatch__", None) is not _PLAIN_DISPATCH
    if own_dispatch or tensor.layout != torch.strided:
        raise CheckpointError(
            f"a {type(tensor).__name__} cannot be stored in safetensors",
            site=key,
            way_out="gather or convert it to a plain tensor before saving",
        )


def _check_no_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"a {type(module).__name__} keeps extra state that is no tensor",
                site=path or None,
                way_out="keep it in a buffer instead of get_extra_state()",
            )


def _entry_of(slot: Slot) -> Entry:
    tensor = slot.tensor
    return Entry(
        kind=slot.kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        requires_grad=tensor.requires_grad,
        # The layout decides how a matmul rounds, so it is kept where it can be.
        stride=None if tensor.is_contiguous() or not _is_dense(tensor) else tensor.stride(),
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is a permutation of a contiguous one."""
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    return tensor.permute(order).is_contiguous()


def site_records(model: nn.Module) -> tuple[SiteRecord, ...]:
    """Every factorized parameter of a model."""
    groups: dict[tuple[int, ...], SiteRecord] = {}
    for name, factors in factored(model):
        key = tuple(id(core) for core in factors.cores)
        before = groups[key].names if key in groups else ()
        groups[key] = replace(record_of(name, factors), names=(*before, name))
    return tuple(groups.values())


def record_of(name: str, factors: FactoredWeight) -> SiteRecord:
    """The record of a factorized parameter, under one of its names."""
    return SiteRecord((name,), tuple(factors.shape), _own_spec(factors), factors.nonlinearity)


def _own_spec(factors: FactoredWeight) -> Spec:
    """The spec of the parameter itself: a Conv1D's layer holds the factors of its transpose."""
    return turned_spec(factors.spec) if factors.frame.transposed else factors.spec
