"""Activation checkpointing that keeps what is small: low-rank products.

A block's input and the outputs of its first factors are saved, r numbers a row each; the rest is
computed again in the backward pass, from there on: second factors, attention, norms, activations,
but no first factor (CoLA-M, Liu et al. 2025).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tensorize.base.errors import TensorizeError
from tensorize.weight import cores
from tensorize.weight.become import become, subclass
from tensorize.weight.low_rank import LowRankLinear

_PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm"))
_now = threading.local()

ALWAYS_SAVED: set[Any] = set()
"""Operations whose results are low-rank products by themselves, wherever they are called."""


def low_rank_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` that saves low-rank products."""
    return create_selective_checkpoint_contexts(_policy)


_checkpoint = partial(checkpoint, use_reentrant=False, context_fn=low_rank_contexts)


def checkpoint_low_rank(model: nn.Module, enabled: bool = True) -> int:
    """Let every block of a model save its input and low-rank products only, while it trains.

    Blocks are the entries of a model's ``nn.ModuleList`` and ``nn.Sequential`` that hold low-rank
    linears, the outermost ones. Evaluation, state dicts and module names are as before.

    Args:
        enabled: False undoes it.

    Returns:
        How many blocks there are.

    Raises:
        TensorizeError: the model has no such block.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise TensorizeError(
            "no entry of a ModuleList or a Sequential holds a low-rank linear",
            way_out="model = tensorize.initialize(model, 0.25) first; other formats save what "
            "tensorize.weight.limit_saved says",
        )
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            # A layer of transformers, which knows what may not be done twice: filling a cache.
            block.gradient_checkpointing = enabled
            block._gradient_checkpointing_func = _checkpoint
        else:
            kind = getattr(type(block), "_saves_all", type(block))
            become(block, checkpointed(kind) if enabled else kind)
        for module in block.modules():
            if isinstance(module, LowRankLinear):
                for handle in module._watched:
                    handle.remove()
                module._watched = ()
                if enabled:
                    module._watched = (
                        module.first.register_forward_pre_hook(_enter),
                        module.first.register_forward_hook(_leave, always_call=True),
                    )
    return len(blocks)


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    narrow = getattr(_now, "narrow", False) and function in _PRODUCTS
    if narrow or function in ALWAYS_SAVED:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _enter(layer: nn.Module, args: Any) -> None:
    _now.narrow = True


def _leave(layer: nn.Module, args: Any, output: Tensor) -> None:
    _now.narrow = False


def _blocks(model: nn.Module) -> Iterator[Any]:
    entries = isinstance(model, nn.ModuleList | nn.Sequential)
    for child in model.children():
        if not entries:
            yield from _blocks(child)
        elif _has_low_rank(child):
            yield child


def _has_low_rank(block: nn.Module) -> bool:
    return any(isinstance(module, LowRankLinear) for module in block.modules())


@cache
def checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A block of this class that computes again in its backward pass what it did not save."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return kind.forward(self, *args, **kwargs)
        return _checkpoint(kind.forward, self, *args, **kwargs)

    return subclass(kind, {"forward": forward, "_saves_all": kind}, checkpointed, kind)


def _blank(kind: type[nn.Module] | tuple[Any, ...]) -> nn.Module:
    """An empty block for old pickles, which fill it."""
    block = cores._blank(*kind) if isinstance(kind, tuple) else kind.__new__(kind)
    become(block, checkpointed(type(block)))
    return block
