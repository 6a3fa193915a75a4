"""Calibration data that a model makes itself: ``calibration="self"``.

A decoder writes text, sampled from its own predictions (as LLM-QAT does, Liu et al. 2023): what it
writes is near to what it was trained on. Any other model gets inputs drawn with the statistics of
its example inputs: random rows of the tables that ids look up, normal numbers elsewhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import CaptureError, ModelError
from tensorize.base.tensors import is_wrapped
from tensorize.capture.fit import fitting
from tensorize.capture.forward import of_the_model, once, untouched
from tensorize.capture.kept import watching
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import LARGEST_FULL_MOMENT, SELF_MADE, Batch, Site

log = logging.getLogger("tensorize")

TOKENS, _BATCH = 128, 4
MOST, FEWEST = 1.0, 1 / 8
"""Shares of the most data that a model makes: 32 sequences, or 16 batches."""
_SEQUENCES, _DRAWN_BATCHES = 32, 16
# An analysis then takes about a minute at most, on one core.
_UNASKED_FLOPS, _UNASKED_MOMENTS = 1e11, 1e9
# Tables with fewer rows than this hold kinds (of tokens, of segments), not a vocabulary.
_SMALLEST_VOCABULARY = 16


def is_self(calibration: Any) -> bool:
    """Whether the model makes its calibration data; an array would answer ``==`` by entries."""
    return isinstance(calibration, str) and calibration == "self"


def self_made(
    model: nn.Module, inputs: Batch | None, seed: int, share: float = MOST
) -> tuple[tuple[Batch, ...], str]:
    """Calibration batches, and in words what they are.

    Args:
        model, inputs: the model, and what it runs on.
        seed: of all that is drawn.
        share: how much data, as a share of the most.

    Raises:
        CaptureError: no inputs are known to start from.
        ModelError: the model does not run on them, or what it writes is not finite.
    """
    if inputs is None:
        raise CaptureError(
            'calibration="self" needs inputs that the model runs on', way_out="pass example_inputs="
        )
    generator = torch.Generator().manual_seed(seed)
    with untouched(model):
        vocabularies = _looked_up(model, inputs)
        ids = only_ids(inputs)
        if ids is not None and is_causal(model, inputs, ids):
            sequences = round(share * _SEQUENCES)
            vocabulary = vocabularies.get(id(ids), 0)
            written = _written(model, inputs, vocabulary, sequences, seed, generator)
            if written is not None:
                count, length = written.shape
                batches = [with_ids(inputs, part) for part in written.split(_BATCH)]
                return _numbered(batches), f"{count} x {length} tokens that the model wrote itself"
    count = round(share * _DRAWN_BATCHES)
    drawn = [_drawn(inputs, vocabularies, generator) for _ in range(count)]
    return _numbered(drawn), f"{count} batches drawn at random"


def _numbered(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    return tuple(replace(b, number=k, source=SELF_MADE) for k, b in enumerate(batches))


def affordable(sites: Sequence[Site], inputs: Batch) -> float:
    """The share of the data that a model makes unasked; 0 where even the fewest are too many.

    What counts are the FLOPs of a forward pass over them, of which an analysis takes some twenty,
    and the memory of the second moments.
    """
    sides = (side for site in sites for side in site.matrix)
    moments = sum(8 * side**2 for side in sides if side <= LARGEST_FULL_MOMENT)
    if moments > _UNASKED_MOMENTS:
        return 0.0
    uses = [(site, use) for site in sites for use in site.uses if use.contract != "lookup"]
    flops = sum(2.0 * math.prod(site.matrix) * use.rows for site, use in uses)
    ids = only_ids(inputs)
    passes = _DRAWN_BATCHES if ids is None else _SEQUENCES * TOKENS / ids.numel()
    share = _UNASKED_FLOPS / max(flops * passes, 1.0)
    if share < FEWEST:
        return 0.0
    return min(2.0 ** math.floor(math.log2(share)), MOST)


def only_ids(inputs: Batch) -> Tensor | None:
    """The ids (B, T) of a text model: its first argument."""
    value = inputs.args[0] if inputs.args else inputs.kwargs.get("input_ids")
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
        return None
    return value


def with_ids(inputs: Batch, ids: Tensor) -> Batch:
    """A call with these ids alone, given as the model was given them."""
    if inputs.args:
        return Batch((ids,), {}, (ids,))
    return Batch((), {"input_ids": ids}, {"input_ids": ids})


def _looked_up(model: nn.Module, inputs: Batch) -> dict[int, int]:
    """Rows of the table that each of the inputs is looked up in, by the input's id."""
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and _has_place(leaf)]
    places = {tensor.data_ptr(): id(tensor) for tensor in tensors}
    parameters = dict(model.named_parameters())
    rows: dict[int, int] = {}

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if matmul.contract != "lookup" or not _has_place(matmul.x):
            return output
        place = places.get(matmul.x.data_ptr())
        if place is not None:
            rows.setdefault(place, parameters[name].shape[0])
        return output

    with fitting(model, inputs), Observer(parameters.items(), on_matmul):
        once(model, inputs)
    return rows


def _has_place(tensor: Tensor) -> bool:
    """Whether its values lie in memory of its own; not of a sparse one, nor under ``torch.vmap``"""
    return tensor.layout == torch.strided and not is_wrapped(tensor)


def is_causal(model: nn.Module, inputs: Batch, ids: Tensor) -> bool:
    """Whether it gives logits (B, T, V), and those of a position depend on nothing behind it."""
    if ids.shape[1] < 2:
        return False
    other = changed_last(ids)
    try:
        with of_the_model("the model does not run on ids alone"):
            logits, changed = (
                getattr(once(model, b), "logits", None)
                for b in (with_ids(inputs, ids), with_ids(inputs, other))
            )
    except ModelError as error:  # it needs more than ids
        log.debug("%s", error)
        return False
    return same_before_last(logits, changed, ids)


def changed_last(ids: Tensor) -> Tensor:
    """Texts (B, T) with other last tokens."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 2
    return other


def same_before_last(logits: object, changed: object, ids: Tensor) -> bool:
    """Whether they are logits (B, T, V) of texts, and those before the last position are alike."""
    if not isinstance(logits, Tensor) or not isinstance(changed, Tensor):
        return False
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        return False
    difference = (logits[:, :-1] - changed[:, :-1]).abs().max()
    return bool(difference <= 1e-3 * logits.abs().max())


def _written(
    model: nn.Module,
    inputs: Batch,
    vocabulary: int,
    sequences: int,
    seed: int,
    generator: torch.Generator,
) -> Tensor | None:
    """Text (sequences, tokens), each from a random first token on; None where none can be had."""
    if vocabulary < _SMALLEST_VOCABULARY:
        return None
    device = next(model.parameters()).device
    start = torch.randint(vocabulary, (sequences, 1), generator=generator).to(device)
    config: Any = getattr(model, "generation_config", None)
    length = min(TOKENS, getattr(getattr(model, "config", None), "max_position_embeddings", TOKENS))
    if config is not None and hasattr(model, "generate"):  # with transformers' cache of keys
        torch.manual_seed(seed)
        plain = type(config)(
            do_sample=True, top_k=0, max_new_tokens=length - 1, min_new_tokens=length - 1,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
        try:
            with of_the_model("generate does not work"), watching():
                return model.generate(  # type: ignore[operator]
                    start, attention_mask=torch.ones_like(start), generation_config=plain
                )
        except ModelError as error:  # a decoder that generates in its own way
            log.debug("%s", error)
    ids = start
    while ids.shape[1] < length:
        batch = with_ids(inputs, ids)
        try:
            with of_the_model(f"no text of {ids.shape[1]} tokens"):
                logits = once(model, batch).logits[:, -1]
        except ModelError as error:  # longer than its context
            log.debug("%s", error)
            return ids[:, :-1] if ids.shape[1] > 8 else None
        chance = logits.float().softmax(-1).cpu()
        if not chance.isfinite().all():
            raise ModelError(
                f"the logits of a text of {ids.shape[1]} tokens are not finite",
                way_out="run the model in a wider dtype, or pass calibration=",
            )
        drawn = torch.multinomial(chance, 1, generator=generator)
        ids = torch.cat([ids, drawn.to(device)], 1)
    return ids


def _drawn(inputs: Batch, vocabularies: dict[int, int], generator: torch.Generator) -> Batch:
    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        if id(value) in vocabularies and vocabularies[id(value)] >= _SMALLEST_VOCABULARY:
            size = vocabularies[id(value)]
            drawn = torch.randint(size, value.shape, generator=generator)
        elif value.is_floating_point():
            mean, spread = (float(f(value.float())) for f in (torch.mean, torch.std))
            if not spread > 0:  # zeros that were made up: nothing is known of the inputs
                mean, spread = 0.0, 1.0
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            drawn = mean + spread * noise
        else:
            return value
        return drawn.to(value.device, value.dtype)

    args, kwargs = pytree.tree_map(draw, (inputs.args, dict(inputs.kwargs)))
    return Batch(args, kwargs, kwargs or args)
