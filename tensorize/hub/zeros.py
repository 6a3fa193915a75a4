"""A model of zeros, to see how it uses its weights: it takes no memory, and its runs no time.

For models that do not run on meta, as the way through them hangs on values.
"""

from __future__ import annotations

import copy
import mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.store.contents import PARAMETER, slots_of, transient_buffers

CAN_BE_WITHOUT_MEMORY = hasattr(mmap, "MAP_ANONYMOUS")


def without_memory(model: nn.Module) -> nn.Module:
    """A copy of a model on meta that runs on the CPU, with weights of zero.

    For models that do not run on meta, as the way through them hangs on values. The system gives
    pages that are only read no memory of their own: all of them are one page of zeros.
    """
    copied = copy.deepcopy(model)
    made: dict[int, Tensor] = {}
    for slot in (*slots_of(copied), *transient_buffers(copied)):
        tensor = slot.tensor
        if id(tensor) not in made and slot.kind == PARAMETER and tensor.numel():
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
            memory = mmap.mmap(-1, tensor.numel() * tensor.element_size(), **private)
            zeros = torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape)
            made[id(tensor)] = nn.Parameter(zeros, requires_grad=tensor.requires_grad)
        elif id(tensor) not in made:  # buffers, which a run may write to
            made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        slot.put(made[id(tensor)])
    return copied


class WithoutWork(TorchDispatchMode):
    """Products are zeros, as they are where all weights are, and nothing is multiplied."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "overloadpacket", None) not in _PRODUCTS:
            return func(*args, **kwargs)
        blank = func(*_on_meta(args), **_on_meta(kwargs))
        return pytree.tree_map(
            lambda value: torch.zeros(value.shape, dtype=value.dtype) if _is(value) else value,
            blank,
        )


_NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution")
_NAMES += ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math")
_PRODUCTS = {getattr(torch.ops.aten, name) for name in _NAMES if hasattr(torch.ops.aten, name)}


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def _on_meta(given: Any) -> Any:
    return pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, given)
