"""What the caller gives, made ready: inputs, calibration batches, and FX graphs for showing.

Example inputs are only needed to see how parameters are used. Without them a model's own
``dummy_inputs`` serve (Hugging Face), then calibration data, then inputs guessed from the shapes of
the first layers; where nothing runs, modules are read by their type (``passes/sites.py``).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tensorize.errors import CaptureError
from tensorize.forward import of_the_model, run, untouched
from tensorize.ir import Batch

log = logging.getLogger("tensorize")

_TEXT_BATCH = 16
_TEXT_TOKENS = 512


def check_model(model: Any, *, on_meta: bool = False) -> None:
    """Raises CaptureError unless ``model`` is a module with real parameters.

    ``on_meta``: parameters without values will do.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model must be a torch.nn.Module, got {type(model).__name__}",
            way_out="pass the module itself, not a function, a path or a state dict",
        )
    if isinstance(model, torch.jit.ScriptModule | fx.GraphModule):
        raise CaptureError(
            f"a {type(model).__name__} is already a captured program",
            way_out="pass the eager module that it was made from",
        )
    count = 0
    for name, parameter in model.named_parameters():
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
        raise CaptureError("the model has no parameters", way_out="there is nothing to compress")


def batch_of(value: Any) -> Batch:
    """One batch: a dict (or mapping) is keyword arguments, a tuple or list positional ones."""
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return Batch((), dict(value), value)
    if isinstance(value, tuple | list):
        return Batch(tuple(value), {}, value)
    return Batch((value,), {}, value)


def calibration_batches(
    calibration: Iterable[Any] | None,
    model: nn.Module,
    tokenizer: Any = None,
    name: str = "calibration",
) -> tuple[Batch, ...]:
    """The caller's data as a tuple of batches, strings tokenized in batches of 16.

    ``name`` is the argument that holds them.
    """
    if calibration is None:
        return ()
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise CaptureError(
            f"{name} must be an iterable of batches, got one {type(calibration).__name__}",
            way_out=f"wrap it in a list: {name}=[batch]",
        )
    items = list(calibration)
    if not items:
        raise CaptureError(f"{name} is empty", way_out="pass at least one batch, or None")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise CaptureError(
                f"{name} holds strings, and there is no tokenizer",
                way_out="pass tokenizer=, or batches of what the model's forward takes",
            )
        items = tokenized(items, model, tokenizer)
    names = positional(model)
    batches = (batch_of(item) for item in items)
    return tuple(replace(batch, names=names, number=k) for k, batch in enumerate(batches))


def positional(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that forward takes by position."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    taken = takewhile(lambda p: p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD), parameters)
    return tuple(p.name for p in taken)


def tokenized(
    texts: Sequence[str],
    model: nn.Module,
    tokenizer: Any,
    batch_size: int = _TEXT_BATCH,
    max_length: int = _TEXT_TOKENS,
) -> list[Mapping[str, Any]]:
    """Texts in batches of what the model's forward takes, cut to the length that it can.

    They are padded together where a mask says so; else each is a batch of its own.
    """
    tokenizer = copy.deepcopy(tokenizer)  # the caller's, and what is saved, stays as it is
    accepted = accepted_names(model)
    if getattr(tokenizer, "pad_token", "") is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    masked = accepted is None or "attention_mask" in accepted
    if not masked or getattr(tokenizer, "pad_token", "") is None:
        batch_size = 1
    tokenizer.padding_side = "right"
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = min(max_length, positions or max_length)
    longest = min(longest, getattr(tokenizer, "model_max_length", longest))
    batches = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(
            list(texts[start : start + batch_size]),
            padding=batch_size > 1,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        batches.append({k: tokens[k] for k in tokens if accepted is None or k in accepted})
    return batches


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


def find_inputs(
    model: nn.Module, example_inputs: Any, calibration: tuple[Batch, ...]
) -> tuple[Batch | None, str]:
    """Inputs to see the model's parameters in use, and where they come from."""
    if example_inputs is not None:
        return batch_of(example_inputs), "example_inputs"
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
    batch = batch_of(example_inputs)
    with of_the_model():
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


# --------------------------------------------------------------------------- graphs for showing


def export_graph(model: nn.Module, batch: Batch) -> fx.GraphModule:
    """The aten-level graph of one forward pass, by ``torch.export``.

    Non-strict first; strict, through dynamo, where a model takes another way when it is compiled.

    Raises:
        CaptureError: the model cannot be exported with these inputs.
    """
    kwargs = dict(batch.kwargs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False  # a key-value cache is no tensor that a graph can return
    failures: list[Exception] = []
    for strict in (False, True):
        try:
            with untouched(model), _silent("torch._subclasses", "torch._dynamo", "torch.export"):
                program = torch.export.export(model, batch.args, kwargs, strict=strict)
            break
        except Exception as error:  # export raises errors of many kinds
            failures.append(error)
    else:
        first = failures[0]
        raise CaptureError(
            f"torch.export cannot trace the model: {type(first).__name__}: {first}",
            way_out="graphs() needs a model that torch.export accepts; everything else works",
        ) from first
    graph, signature = program.graph_module, program.graph_signature
    graph.meta["tensorize_names"] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }
    return graph


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keep loggers and warnings quiet about an attempt whose failure is handled."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_VIEWS = ("aten.t.", "aten.permute.", "aten.transpose.", "aten.view.", "aten.detach.", "aten.to.")


def mark_sites(
    graph: fx.GraphModule, parameters: Mapping[str, tuple[str, str, tuple[int, ...]]]
) -> None:
    """Note in ``graph.meta["tensorize_sites"]`` which nodes compute with which site.

    ``parameters``: qualified name of a graph's parameter → (site, format, ranks).
    """
    names: Mapping[str, str] = graph.meta.get("tensorize_names", {})
    marks: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for node in graph.graph.nodes:
        site = parameters.get(names.get(node.name, ""))
        if node.op != "placeholder" or site is None:
            continue
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            if str(user.target).startswith(_VIEWS):
                waiting.extend(user.users)
            else:
                marks[user.name] = site
    graph.meta["tensorize_sites"] = marks
