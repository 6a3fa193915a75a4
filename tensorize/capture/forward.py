"""Run the caller's model and leave it exactly as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from tensorize.base.errors import AnalysisError, ModelError, TensorizeError
from tensorize.ir.sites import Batch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_usual_modes(verb: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function that runs outside of inference mode, and refuses to under autocast.

    What inference mode makes, no gradient can pass; autocast would round the decompositions.

    Args:
        verb: what the caller called.

    Raises:
        AnalysisError: autocast is on.
    """

    def decorated(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
                raise AnalysisError(
                    f"{verb} was called under torch.autocast, which would round what it computes "
                    "beside the model, and keep copies of weights that change",
                    way_out="call it outside of it; a model may use autocast inside its forward",
                )
            if not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            with torch.inference_mode(False):
                return function(*args, **kwargs)

        return called

    return decorated


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random state are put back after."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with torch.random.fork_rng(), torch.no_grad(), _recurrent_gradients(model):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own in buffers:  # a forward may write into buffers, or put others in place
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextlib.contextmanager
def _recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """cuDNN has no gradients of recurrent layers in evaluation mode; torch's own kernels do."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
        yield


def run(model: nn.Module, batch: Batch) -> Any:
    """The outputs of one forward pass in evaluation mode."""
    with untouched(model):
        return model(*batch.args, **batch.kwargs)


@contextlib.contextmanager
def of_the_model(what: str, way_out: str | Callable[[], str] | None = None) -> Iterator[None]:
    """The caller's model runs in here, and what it raises is told as its own.

    What the library raises is no error of the model's and comes as it is: an error of tensorize,
    and whatever is raised in a block ``ours``. So does it where memory runs out.

    Raises:
        ModelError: the model raised; ``what`` says on which occasion. ``way_out`` is asked then.
    """
    try:
        yield
    except _Ours as ours:
        raise ours.error from ours.error.__cause__
    except Exception as error:
        if isinstance(error, TensorizeError) or out_of_memory(error):
            raise
        out = way_out() if callable(way_out) else way_out
        raise ModelError(f"{what}: {type(error).__name__}: {error}", way_out=out) from error


class _Ours(BaseException):
    """Takes an error of the library's out of the model that runs around it: nothing there catches
    it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """The library's own code runs in here, called by a model that runs in ``of_the_model``."""
    try:
        yield
    except Exception as error:
        raise _Ours(error) from error


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Of a CPU's torch says so only in words."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
