"""What is made of tensors as they are now, kept as long as they are, and made again after a write.

Writes are those that torch counts: one through ``.data`` is not seen, as autograd does not see it
either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_Result = TypeVar("_Result")

# By the first of the tensors: how the others and their values were, and what was made of them.
_Made = tuple[list[TensorWeakRef], list[tuple[int, int]], Any]
_made: Any = WeakTensorKeyDictionary()


def made_of(
    make: Callable[[Sequence[Tensor]], _Result],
    tensors: Sequence[Tensor],
    key: Hashable = None,
) -> _Result:
    """What ``make`` makes of tensors as they are now.

    ``key``: what tells it from other things that are made of the same tensors; None: ``make``.
    """
    known: dict[Any, _Made] = _made.setdefault(tensors[0], {})
    place = make if key is None else key, tuple(map(id, tensors))
    state = [(_version(tensor), tensor.data_ptr()) for tensor in tensors]
    if place in known:
        references, before, result = known[place]
        same = (ref() is tensor for ref, tensor in zip(references, tensors, strict=True))
        if before == state and all(same):
            return result
    with torch.no_grad():
        result = make([tensor.detach() for tensor in tensors])
    known[place] = [TensorWeakRef(tensor) for tensor in tensors], state, result
    return result


def _version(tensor: Tensor) -> int:
    """The number of writes to a tensor; what inference mode made does not count them."""
    return -1 if tensor.is_inference() else tensor._version
