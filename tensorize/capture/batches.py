"""Calibration data as batches of what forward takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import CaptureError
from tensorize.capture.inputs import accepted_names, batch_of, most_positional, positional
from tensorize.ir.sites import Batch

ToInputs = Callable[[Any], Any]
"""Makes what forward takes (a tensor, a tuple, a dict) of a batch of the caller's."""

_TEXT_BATCH = 16
_TEXT_TOKENS = 512


def calibration_batches(
    calibration: Iterable[Any] | None,
    model: nn.Module,
    tokenizer: Any = None,
    name: str = "calibration",
    to_inputs: ToInputs | None = None,
) -> tuple[Batch, ...]:
    """The caller's data as a tuple of batches, strings tokenized in batches of 16.

    What a batch holds behind the arguments that forward takes (targets, of a loader of pairs) is
    not passed to the model; a ``loss_fn`` gets all of it.

    Args:
        name: the argument that holds them.
        to_inputs: makes what forward takes of a batch.
    """
    if calibration is None:
        return ()
    items = list(check_batches(calibration, name))
    if not items:
        raise CaptureError(f"{name} is empty", way_out="pass at least one batch, or None")
    if to_inputs is None and all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise CaptureError(
                f"{name} holds strings, and there is no tokenizer",
                way_out="pass tokenizer=, or batches of what the model's forward takes",
            )
        items = tokenized(items, model, tokenizer)
    names, most = positional(model), most_positional(model)
    found = []
    for k, item in enumerate(items):
        batch = batch_of(item if to_inputs is None else to_inputs(item))
        if to_inputs is not None:
            batch = replace(batch, given=item)
        elif most:
            batch = replace(batch, args=batch.args[:most])
        found.append(replace(batch, names=names, number=k, source=name))
    return tuple(found)


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its arguments on a device; what the caller gave stays where it is."""
    given = batch.args, dict(batch.kwargs)
    args, kwargs = pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, Tensor) else value, given
    )
    return replace(batch, args=args, kwargs=kwargs)


def left_out(batches: Sequence[Batch]) -> tuple[str, ...]:
    """A note, where parts of the caller's batches are not passed to the model."""
    for batch in batches:
        taken, given = len(batch.args), batch.given
        if isinstance(given, tuple | list) and not batch.kwargs and 0 < taken < len(given):
            what = f"the first {taken}" if taken > 1 else "the first"
            return (
                f"forward takes {', '.join(batch.names)}: of the {len(given)} parts of a batch "
                f"{what} went in, the others (targets) did not",
            )
    return ()


def check_batches(batches: Any, name: str) -> Iterable[Any]:
    """Batches that a caller gave, taken none of.

    Raises:
        CaptureError: they are one batch, or nothing that gives batches.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CaptureError(
            f"{name} must be an iterable of batches, got one {type(batches).__name__}",
            way_out=f"wrap it in a list: {name}=[batch]",
        )
    return batches


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
