"""The dtype that a product is computed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.base.tensors import is_index


def multiplied_in(dtype: torch.dtype, device: str) -> str:
    """The dtype that cores of a dtype meet their input in, by its name."""
    slow = device == "cpu" and dtype in SLOW_ON_CPU
    return str(torch.float32 if slow else dtype).removeprefix("torch.")


# Asked once: dynamo cannot trace the question in torch 2.11.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def autocast(x: Tensor, cores: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """In the dtype that autocast gives matmuls: what is saved is then of one dtype."""
    device = x.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return x, cores
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), [_cast(core, dtype) for core in cores]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = tensor.dtype == torch.float64 or is_index(tensor)
    return tensor if kept else tensor.to(dtype)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """x in the wider dtype of the weight that it meets.

    Code that keeps some weights in float32 (T5) casts their input only where the weight is a
    tensor, which a lazy one is not.
    """
    if x.dtype is weight.dtype:
        return x
    narrow = x.dtype.itemsize < weight.dtype.itemsize and x.is_floating_point()
    if not narrow or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def _without_instructions() -> frozenset[torch.dtype]:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if torch.backends.mkldnn.is_available():
        ask = {
            dtype: getattr(torch.ops.mkldnn, f"_is_mkldnn_{n}_supported")
            for dtype, n in names.items()
        }
        return frozenset(dtype for dtype, supported in ask.items() if not supported())
    return frozenset(names)


SLOW_ON_CPU = _without_instructions()
"""Dtypes that torch multiplies number by number on this processor: measured on one Zen 3 core, at 1
to 10 GFLOP/s where float32 has 60."""

_CAST = 96
"""Rank for each row up to which casting two factors to float32 takes less than it saves."""


def in_float32(x: Tensor, rank: int | None = None) -> bool:
    """Whether a product of x with a weight is faster in float32, casts included.

    Of a tensor train it always is where x has such a dtype, because a core meets many entries of
    every row; in low rank (of this ``rank``) from some rows on. Not where gradients are recorded,
    which would keep both copies.
    """
    if x.dtype not in SLOW_ON_CPU or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if rank is None:
        return True
    # A graph is not to be compiled again for this.
    return not torch.compiler.is_compiling() and rank * x.shape[-1] < _CAST * x.numel()
