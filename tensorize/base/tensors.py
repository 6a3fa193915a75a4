"""Tensors as they come: quantized, sharded, mapped from a file, of adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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
    for name in names:
        yield from plain_parts(getattr(tensor, name))


_ALIGNMENT = 64  # bytes, as torch allocates


def at_work(weight: Tensor) -> Tensor:
    """At least in float32, in aligned memory: how a matmul rounds hangs on where its operands lie.

    A weight that is mapped from a file lies anywhere.
    """
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return weight.to(dtype, copy=weight.data_ptr() % _ALIGNMENT != 0)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of an ordinary tensor as they lie in memory, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; formats of less than two bytes are not looked at."""
    parts = (p for p in plain_parts(tensor) if p.is_floating_point() and p.dtype.itemsize > 1)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def adapted_layers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that peft wrapped with an adapter; peft itself is not needed."""
    modules = model.named_modules()
    return tuple(path for path, m in modules if hasattr(type(m), "adapter_layer_names"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and what ``torch.compile`` made of it."""
    for name in ("module", "_orig_mod"):
        inner = model._modules.get(name)
        if inner is not None and len(model._modules) == 1:
            return unwrapped(inner)
    return model


def device_of(model: nn.Module) -> str:
    """The first GPU that a parameter is on, else the CPU."""
    return next((str(p.device) for p in model.parameters() if p.is_cuda), "cpu")
