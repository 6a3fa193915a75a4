"""Models that differentiate inside of their forward: forces, scores, residuals of equations."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
"""The functions by which a forward asks autograd for gradients."""

_differentiating: WeakSet[nn.Module] = WeakSet()


def differentiates(model: nn.Module) -> bool:
    """Whether a run of the model was seen to differentiate."""
    return model in _differentiating


def note_that_it_differentiates(model: nn.Module) -> None:
    """From now on its runs have gradients."""
    _differentiating.add(model)


def note_copy(model: nn.Module, of: nn.Module) -> None:
    """A copy does as the model that it is a copy of."""
    if differentiates(of):
        note_that_it_differentiates(model)


def is_transformed() -> bool:
    """Whether this is called by a function under a transform of ``torch.func``: grad, vmap, …"""
    return peek_interpreter_stack() is not None


def lacks_gradients(error: RuntimeError) -> bool:
    """Whether it is autograd's own, asked for gradients that nobody had kept a graph for."""
    return "does not require grad" in str(error) and any(
        trace.tb_frame.f_globals.get("__name__") == "torch.autograd"
        for trace in _traces(error.__traceback__)
    )


def _traces(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Gradients that a forward takes in here keep their graph, whether or not it asks for that."""
    with warnings.catch_warnings(), _KeepGraphs():
        # The graph is held by a gradient that goes with the run.
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        yield


class _KeepGraphs(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DERIVATIVES:
            kwargs = {**kwargs, "create_graph": True, "retain_graph": True}
        return func(*args, **kwargs)
