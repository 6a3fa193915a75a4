"""A parameter that is made for each call that uses it: dense for the model, and never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Rebuilt(Tensor):
    """Stands for a dense parameter wherever a model may look at it: class, names, shape, values."""

    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Any, make: Callable[[], Tensor]) -> Rebuilt:
        rebuilt = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        rebuilt._make = make
        return rebuilt

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Rebuilt(args[0], args[0]._make)

        def dense(value: Any) -> Any:
            return value._make() if isinstance(value, Rebuilt) else value

        args, keywords = pytree.tree_map(dense, (args, kwargs or {}))
        return func(*args, **keywords)


def rebuilt(like: Any, make: Callable[[], Tensor], noise: float = 0.0) -> nn.Parameter:
    """A parameter of the shape, dtype and place of ``like``, made by ``make`` at each call.

    ``noise``: every entry is multiplied by a number of [1 − noise, 1 + noise], always the same one.
    """

    def blurred() -> Tensor:
        dense = make().detach()
        if not noise:
            return dense
        generator = torch.Generator(dense.device).manual_seed(0)
        factor = torch.empty(dense.shape, device=dense.device)
        return dense * factor.uniform_(1 - noise, 1 + noise, generator=generator).to(dense.dtype)

    return nn.Parameter(Rebuilt(like, blurred), requires_grad=like.requires_grad)
