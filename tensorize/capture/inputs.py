"""What the caller gives, made ready: inputs, calibration batches, and FX graphs for showing.

Example inputs are only needed to see how parameters are used. Without them a model's own
``dummy_inputs`` serve (Hugging Face), then calibration data, then inputs guessed from the shapes of
the first layers; where nothing runs, modules are read by their type (``passes/observe/sites.py``).
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from tensorize.base.errors import CaptureError
from tensorize.base.tensors import unwrapped
from tensorize.capture.fit import fitting
from tensorize.capture.forward import run
from tensorize.ir.sites import EXAMPLE, Batch

log = logging.getLogger("tensorize")


def check_module(model: Any) -> nn.Module:
    """What a caller gave as a model.

    Raises:
        CaptureError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model must be a torch.nn.Module, got {type(model).__name__}",
            way_out="pass the module itself, not a function, a path or a state dict",
        )
    return model


def check_model(model: Any, *, on_meta: bool = False, inplace: bool = False) -> nn.Module:
    """The module that a caller gave, out of torch's own wrappers.

    Args:
        on_meta: parameters without values will do.
        inplace: it is to be changed itself.

    Raises:
        CaptureError: it is no module with real parameters, or cannot be changed in place.
    """
    model = check_module(model)
    if inplace and isinstance(model, nn.parallel.DistributedDataParallel):
        raise CaptureError(
            "DistributedDataParallel gathers the gradients of the dense parameters, so its model "
            "cannot be changed in place",
            way_out="pass model.module, and wrap the result",
        )
    model = unwrapped(model)
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # else nothing is sharded by it
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise CaptureError(
                "FullyShardedDataParallel holds the parameters in flat pieces: there are no "
                "matrices to factorize",
                site=name or None,
                way_out="pass the model before it is sharded, and shard the result",
            )
    if isinstance(model, torch.jit.ScriptModule | fx.GraphModule):
        raise CaptureError(
            f"a {type(model).__name__} is already a captured program",
            way_out="pass the eager module that it was made from",
        )
    count = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise CaptureError(
                "the parameter has no shape yet: its layer is lazy, and learns the shape at its "
                "first call",
                site=name,
                way_out="call the model once on an input of its own first: model(x)",
            )
        count += parameter.numel()
        if parameter.is_meta and not on_meta:
            raise CaptureError(
                "the parameter is on the meta device: it has no values to analyse",
                site=name,
                way_out="load the weights; a model is compiled before it is offloaded, not after",
            )
        if parameter.is_inference():
            raise CaptureError(
                "the parameter was made under torch.inference_mode: no gradient passes it",
                site=name,
                way_out="make or load the model outside of inference mode",
            )
    if count == 0:
        packed = (m for m in model.modules() if "quantized" in type(m).__module__)
        if (layer := next(packed, None)) is not None:
            raise CaptureError(
                f"the model has no parameters: quantized layers ({type(layer).__name__}) hold "
                "packed ones",
                way_out="pass the model from before it was quantized, and quantize the result",
            )
        raise CaptureError("the model has no parameters", way_out="there is nothing to compress")
    return model


def notes_on_wrapper(given: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """What is said of a model that was taken out of a wrapper; nothing of others."""
    if given is model:
        return ()
    name = type(given).__name__
    return (f"what comes back is the model inside of {name}: wrap it again, or compile it again",)


def batch_of(value: Any) -> Batch:
    """One batch: a dict (or mapping) is keyword arguments, a tuple or list positional ones."""
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return Batch((), dict(value), value)
    if isinstance(value, tuple | list):
        return Batch(tuple(value), {}, value)
    return Batch((value,), {}, value)


def positional(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that forward takes by position."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    taken = takewhile(lambda p: p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD), parameters)
    return tuple(p.name for p in taken)


def most_positional(model: nn.Module) -> int | None:
    """How many arguments forward takes by position; None where that has no end."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return len(positional(model))


def takes(model: nn.Module, name: str) -> bool:
    """Whether forward may be given an argument by this name."""
    parameters = inspect.signature(model.forward).parameters.values()
    accepted = accepted_names(model)
    named = accepted is None or name in accepted
    return named or any(p.kind is p.VAR_KEYWORD for p in parameters)


def accepted_names(model: nn.Module) -> set[str] | None:
    """The names that forward takes; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and len(parameters) == 1:
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


_CACHE = "use_cache"


def without_cache(model: nn.Module, batch: Batch) -> Batch:
    """The batch as a call that keeps no keys and values for tokens to come, unless it says so.

    They are no output that anything is compared by, and stay there as long as the run.
    """
    asked = _CACHE in batch.kwargs or _CACHE in positional(model)[: len(batch.args)]
    if asked or _CACHE not in (accepted_names(model) or ()):
        return batch
    return replace(batch, kwargs={**batch.kwargs, _CACHE: False})


def find_inputs(
    model: nn.Module, example_inputs: Any, calibration: tuple[Batch, ...]
) -> tuple[Batch | None, str]:
    """Inputs to see the model's parameters in use, and where they come from."""
    if example_inputs is not None:
        return replace(batch_of(example_inputs), source=EXAMPLE), EXAMPLE
    if calibration:
        return calibration[0], "the first calibration batch"
    own = getattr(model, "dummy_inputs", None)
    device = next(model.parameters()).device
    own = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, own)
    candidates: list[tuple[Any, str]] = [] if own is None else [(own, "the model's dummy_inputs")]
    candidates += [(guess, "inputs guessed from the first layers") for guess in _guesses(model)]
    for candidate, source in candidates:
        batch = batch_of(candidate)
        try:
            run(model, batch)
        except Exception as error:  # whatever a wrong guess raises, the next one is tried
            log.debug("%s do not fit: %s", source, error)
            continue
        return batch, source
    return None, "none: modules are read by their type"


def checked(model: nn.Module, example_inputs: Any) -> Batch:
    """The caller's own inputs.

    Raises:
        CaptureError: the model does not run on them.
    """
    batch = replace(batch_of(example_inputs), source=EXAMPLE)
    with fitting(model, batch):
        run(model, batch)
    return batch


def needed(model: nn.Module, example_inputs: Any, what: str) -> Batch:
    """The caller's own inputs, else those that are found; ``what`` is said where there are none.

    Raises:
        CaptureError: no inputs are known, or the model does not run on the caller's.
    """
    if example_inputs is not None:
        return checked(model, example_inputs)
    batch, _ = find_inputs(model, None, ())
    if batch is None:
        raise CaptureError(what, way_out="pass example_inputs=")
    return batch


def _guesses(model: nn.Module) -> Iterator[Any]:
    """Inputs that a model with one required argument may take, by its first weights."""
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        return
    first = next(model.parameters())
    device = first.device
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.long, device=device)
            break
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    dtype = first.dtype if first.is_floating_point() else torch.float32
    if channels is not None:
        for side in (32, 64, 224):
            yield torch.zeros(2, channels, side, side, dtype=dtype, device=device)
    widths = [p.shape[-1] for p in model.parameters() if p.dim() == 2]
    widths += [p.shape[0] for p in model.parameters() if p.dim() == 2]
    for width in dict.fromkeys(widths):
        yield torch.zeros(2, width, dtype=dtype, device=device)
        yield torch.zeros(2, 8, width, dtype=dtype, device=device)
