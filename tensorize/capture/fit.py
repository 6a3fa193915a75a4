"""Runs of the caller's model on the caller's data, and what to do where the two do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.capture.forward import of_the_model
from tensorize.ir.sites import ALONE, EXAMPLE, SELF_MADE, Batch


def fitting(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """``of_the_model`` for a run of a model on a batch of the caller's.

    What is raised says where the batch comes from, and how it is made to fit.
    """
    one = {EXAMPLE: "the example inputs do not fit", ALONE: "the batch does not fit"}
    several = f"{batch.source}: batch {batch.number} does not fit"
    what = f"{one.get(batch.source, several)} the model's forward"
    return of_the_model(what, lambda: _way_out(model, batch))


def _way_out(model: nn.Module, batch: Batch) -> str:
    """How a batch is made to fit: by its arguments, else by its tensors."""
    option, given = batch.source, batch.given
    if option == SELF_MADE:
        return "pass calibration=, data that the model runs on"
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_end = any(p.kind is p.VAR_POSITIONAL for p in parameters) or not parameters
    if isinstance(given, tuple | list) and len(given) > len(names) and not open_end:
        takes = (
            f"a batch has {len(given)} parts and forward takes {len(names)} ({', '.join(names)})"
        )
        return f"{takes}: leave the others (targets) out, {_each(option, f'batch[:{len(names)}]')}"
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters) or not parameters
    if isinstance(given, Mapping) and not anything and (unknown := set(given) - known):
        if known & set(given):
            left_out = f"{{k: v for k, v in batch.items() if k not in {sorted(unknown)}}}"
            return f"forward takes no {', '.join(sorted(unknown))}: {_each(option, left_out)}"
        return (
            "a dict is keyword arguments; where forward takes it as one, it is a part of a tuple: "
            f"{_each(option, '(batch,)')}"
        )
    return _of_tensors(model, batch)


def _each(option: str, changed: str) -> str:
    """An option with every batch changed, as Python."""
    if option in (EXAMPLE, ALONE):
        return f"{option}={changed.replace('batch', option)}"
    return f"{option}=[{changed} for batch in {option}]"


def _of_tensors(model: nn.Module, batch: Batch) -> str:
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    parameters = list(model.parameters())
    if not tensors and any(hasattr(leaf, "__array__") for leaf in leaves):
        return f"give tensors: {_each(batch.source, 'torch.as_tensor(batch)')}"
    devices = {p.device for p in parameters}
    if any(t.device not in devices for t in tensors) and len(devices) == 1:
        return f"move its tensors to the model's device: tensor.to({str(devices.pop())!r})"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if any(t.is_floating_point() and t.dtype not in dtypes for t in tensors) and len(dtypes) == 1:
        return f"give its tensors the model's dtype: tensor.to({dtypes.pop()})"
    if batch.source == EXAMPLE:
        return "example_inputs= is a tuple of positional or a dict of keyword arguments"
    return (
        "a batch is what forward takes: a tensor, a tuple of positional or a dict of keyword "
        "arguments"
    )
