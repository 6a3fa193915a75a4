"""Tensors as they come: quantized, sharded, mapped from a file, of adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tensorize.base.dynamo import compiled_from

_ELEMENTS = 4_000_000
"""Of what is made some rows at a time."""

_WORTH = 100_000
"""Elements of a weight after whose work some milliseconds do not count."""


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is an ordinary tensor, and not of a kind that dispatches for itself."""
    return type(parameter) is nn.Parameter or type(parameter.data) is Tensor


def is_index(tensor: Tensor) -> bool:
    """Whether a tensor says where something is, and is no number of a model."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a wrapper (a quantized tensor, a shard) is made of, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    for part in parts:
        if isinstance(part, Tensor):  # a shard has its mesh there as well
            yield from plain_parts(part)


def lies_in_memory(tensor: Tensor) -> bool:
    """Whether an ordinary tensor's entries have addresses: not those of a sparse one, or a lazy
    one that has no shape yet."""
    return not is_lazy(tensor) and is_plain(tensor) and tensor.layout == torch.strided


def is_wrapped(tensor: Tensor) -> bool:
    """Whether vmap or another transform of functions has hold of a tensor: it has no entries."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def doubled(tensor: Tensor) -> Tensor:
    """In double precision, real or complex as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def singled(tensor: Tensor) -> Tensor:
    """In single precision, real or complex as it is."""
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def squared(tensor: Tensor) -> Tensor:
    """|x|² of every entry, which is real."""
    if not tensor.is_complex():
        return tensor.square()
    return torch.view_as_real(tensor.resolve_conj()).square().sum(-1)


def reals(tensor: Tensor) -> int:
    """How many numbers a tensor holds: a complex entry is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


_ALIGNMENT = 64  # bytes, as torch allocates


def at_work(weight: Tensor) -> Tensor:
    """At least in float32, in aligned memory: how a matmul rounds hangs on where its operands lie.

    A weight that is mapped from a file lies anywhere.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype, copy=weight.data_ptr() % _ALIGNMENT != 0)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of an ordinary tensor as they lie in memory, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; formats of less than two bytes are not looked at."""
    parts = (p for p in plain_parts(tensor) if not is_index(p) and p.dtype.itemsize > 1)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def adapted_layers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that peft wrapped with an adapter; peft itself is not needed."""
    modules = model.named_modules()
    return tuple(path for path, m in modules if hasattr(type(m), "adapter_layer_names"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's own wrappers: DDP, DataParallel, what ``torch.compile`` gave.

    They are known by their class: a class of the user's own may do more than hand on its input.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = compiled_from(model)
        if inner is None:
            return model
        model = inner


def untransformed(tensor: Tensor) -> Tensor:
    """The tensor inside of what ``torch.vmap`` and its like made of it, or itself."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)  # type: ignore[attr-defined]
    return tensor


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a qualified name, whatever its owner shows in its place.

    tensorly-torch's complex tensors hold pairs of reals, and show complex numbers.

    Raises:
        AttributeError: there is none.
    """
    path, _, leaf = name.rpartition(".")
    found = model.get_submodule(path)._parameters.get(leaf)
    if found is None:
        raise AttributeError(f"{name} is no parameter")
    return found


def device_of(model: nn.Module) -> str:
    """The first GPU that a parameter is on, else the CPU."""
    return next((str(p.device) for p in model.parameters() if p.is_cuda), "cpu")


def give_back(elements: int = _WORTH) -> None:
    """Return what was freed to the system, where the C library keeps it: glibc does.

    Nothing is done after work on few ``elements``, beside which it would take long.

    Between tensors that stay lie holes of those that went, which count as the process's memory: as
    much again as all tensors of an analysis. It takes some milliseconds.
    """
    if elements >= _WORTH and (trim := _trim()):
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library can be asked, as on Windows
        return None


def in_rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of equally many rows (rows, …) in parts of rows, each of some megabytes.

    What is made of one part after the other is never there of all rows at once.
    """
    width = max(tensor[:1].numel() for tensor in tensors)
    parts = (tensor.split(max(_ELEMENTS // max(width, 1), 1)) for tensor in tensors)
    return list(zip(*parts, strict=True))
