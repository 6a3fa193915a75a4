"""Run the caller's model and leave it exactly as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base import dynamo
from tensorize.base.errors import AnalysisError, ModelError, TensorizeError
from tensorize.capture.inner_gradients import (
    differentiates,
    lacks_gradients,
    note_that_it_differentiates,
    twice_differentiable,
)
from tensorize.capture.kept import Kept, keeping, watching
from tensorize.ir.sites import Batch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_usual_modes(verb: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function that runs outside of inference mode, and refuses to under autocast.

    What inference mode makes, no gradient can pass; autocast would round the decompositions. Where
    a block builds models on meta, what is planned in it has values all the same.

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
            with contextlib.ExitStack() as modes:
                if torch.is_inference_mode_enabled():
                    modes.enter_context(torch.inference_mode(False))
                if torch.get_default_device().type == "meta":
                    modes.enter_context(torch.device("cpu"))
                return function(*args, **kwargs)

        return called

    return decorated


@contextlib.contextmanager
def untouched(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[Kept]:
    """Evaluation mode without gradients; what runs (``once``) change is put back after.

    ``but`` are tensors whose values the caller of this means to change.

    Raises:
        ModelError: the model cannot be put into evaluation mode.
    """
    with (
        keeping(model, but) as kept,
        torch.no_grad(),
        _recurrent_gradients(model),
    ):
        if any(module.training for module in model.modules()):
            with watching(), of_the_model("model.eval() fails", _OWN_EVAL):
                model.eval()
        yield kept


_OWN_EVAL = (
    "put the model into evaluation mode as it needs it before the call, so that no module's "
    ".training is True"
)


@contextlib.contextmanager
def _recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """cuDNN has no gradients of recurrent layers in evaluation mode; torch's own kernels do."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
        yield


def run(model: nn.Module, batch: Batch) -> Any:
    """The outputs of one forward pass in evaluation mode."""
    with untouched(model):
        return once(model, batch)


def once(model: nn.Module, batch: Batch) -> Any:
    """The outputs of one forward pass, inside of ``untouched``.

    A model that differentiates in its forward (forces are gradients of an energy) has gradients
    there, be they off around it; where they are on, what it gives can be differentiated once more.
    """
    with watching(), dynamo.nothing_compiled():
        if torch.is_grad_enabled():
            with twice_differentiable() if differentiates(model) else contextlib.nullcontext():
                return model(*batch.args, **batch.kwargs)
        if not differentiates(model):
            try:
                return model(*batch.args, **batch.kwargs)
            except RuntimeError as error:
                if not lacks_gradients(error):
                    raise
            note_that_it_differentiates(model)
        with torch.enable_grad():
            result = model(*batch.args, **batch.kwargs)
        return pytree.tree_map(_detached, result)


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


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
