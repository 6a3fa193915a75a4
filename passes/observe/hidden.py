"""Which rows of an output a batch's masks, labels and pictures hide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.ir.sites import Batch

IGNORED = -100
"""The label of a row that counts in nothing."""

# torch's own masks of padding are true where it stands; transformers' masks where it does not.
_SHOWN, _SHOWN_BY_DECODER = "attention_mask", "decoder_attention_mask"
_HIDDEN, _HIDDEN_BY_DECODER = "key_padding_mask", "tgt_key_padding_mask"
_DECODERS = {_SHOWN_BY_DECODER, _HIDDEN_BY_DECODER}
# Some use these names in the one way, some in the other.
_EITHER = "padding_mask", "pad_mask"
# Of a configuration of transformers: the id at whose places a picture's, a video's or a sound's
# features are put.
_NO_WORD = re.compile(r"(image|video|audio|sound)(_context)?_token_(id|index)")


def counted_rows(output: Tensor, batch: Batch, model: nn.Module, result: Any) -> Tensor | None:
    """A mask over the output's rows (all but the last axis, flattened); None: all count."""
    lead = tuple(output.shape[:-1])
    counted: Tensor | None = None
    labels = batch.argument("labels")
    if isinstance(labels, Tensor):
        if labels.dim() > 1 and _shifts(model, result, output, labels):
            # Position t predicts label t + 1; the last position predicts nothing.
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        counted = _over_rows(labels != IGNORED, lead)
    words = _before_words(batch, model)
    for mask in _of_outputs(batch, model) + ([] if words is None else [words]):
        shown = _over_rows(mask, lead)
        if shown is not None:
            counted = shown if counted is None else counted & shown
    return counted


def hides_rows(batch: Batch, model: nn.Module) -> bool:
    """Whether a batch's masks, labels or pictures hide anything."""
    labels, words = batch.argument("labels"), _before_words(batch, model)
    ignored = isinstance(labels, Tensor) and bool((labels == IGNORED).any())
    masks = [*_masks(batch).values(), *([] if words is None else [words])]
    return ignored or not all(bool(mask.all()) for mask in masks)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a position is compared with the next label: what transformers' decoders do."""
    kind = getattr(model, "loss_type", None)  # None for decoders with names of an older kind
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    older = kind is None and type(model).__name__.endswith("LMHeadModel")
    return (
        kind == "ForCausalLM"
        or older
        or (kind == "ForConditionalGeneration" and not encoder_decoder)
    )


def _shifts(model: nn.Module, result: Any, output: Tensor, labels: Tensor) -> bool:
    """The same of any model: where it gives its loss, by which of the two that loss is."""
    loss = loss_of(result)
    if shifts_labels(model) or loss is None or tuple(labels.shape) != tuple(output.shape[:-1]):
        return shifts_labels(model)
    if labels.is_floating_point() or not bool((labels[..., 1:] != IGNORED).any()):
        return False
    with torch.no_grad():
        plain, shifted = (
            float(
                F.cross_entropy(
                    logits.float().reshape(-1, output.shape[-1]), wanted.reshape(-1).long()
                )
            )
            for logits, wanted in ((output, labels), (output[..., :-1, :], labels[..., 1:]))
        )
    own = float(loss.detach())
    return abs(own - shifted) < abs(own - plain)


def loss_of(result: Any) -> Tensor | None:
    """The loss that a model computed by itself."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _before_words(batch: Batch, model: nn.Module) -> Tensor | None:
    """A mask of the positions (samples, T) of a decoder's ids that a word follows on, or nothing.

    What it says of the next token where that stands for a part of a picture is read by nobody, and
    was never learnt: such places have no label. None for models that take no pictures.
    """
    ids, config = batch.argument("input_ids"), getattr(model, "config", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not shifts_labels(model):
        return None
    names = [name for name in dir(config) if _NO_WORD.fullmatch(name)]
    known = {getattr(config, name) for name in names} - {None}
    if not known:
        return None
    word = ~torch.isin(ids, torch.tensor(sorted(known), device=ids.device))
    return F.pad(word[:, 1:], (0, 1), value=True)


def _over_rows(mask: Tensor, lead: tuple[int, ...]) -> Tensor | None:
    """A mask of positions as one over the rows of an output; None where it does not fit.

    Outputs may have time first, or all positions in one axis.
    """
    shape = tuple(mask.shape)
    if lead in (shape, (mask.numel(),)):
        return mask.reshape(-1)
    return mask.t().reshape(-1) if mask.dim() == 2 and lead == shape[::-1] else None


def _masks(batch: Batch) -> dict[str, Tensor]:
    """The masks of a batch by name, true (samples, positions) where they show something."""
    found: dict[str, Tensor] = {}
    for name in [*dict(zip(batch.names, batch.args, strict=False)), *batch.kwargs]:
        value = batch.argument(name)
        known = name in (_SHOWN, _SHOWN_BY_DECODER) or name.endswith((_HIDDEN, *_EITHER))
        # One of scores (B, 1, 1, T) says what one of positions (B, T) does.
        if known and isinstance(value, Tensor) and value.dim() >= 2:
            mask = value.flatten(1)
            if mask.shape[1] == value.shape[-1]:
                found[name] = _shown(name, mask)
    return found


def _of_outputs(batch: Batch, model: nn.Module) -> list[Tensor]:
    """The masks that speak of a model's outputs: of two sequences, those of the decoder's."""
    masks = _masks(batch)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    two = two or isinstance(batch.argument("tgt"), Tensor) or _DECODERS & masks.keys()
    return [mask for name, mask in masks.items() if name in _DECODERS or not two]


def _shown(name: str, mask: Tensor) -> Tensor:
    if mask.is_floating_point() and bool((mask <= 0).all()):
        return mask == 0  # it is added to the scores
    true = mask != 0
    if name.endswith(_EITHER) and not name.endswith(_HIDDEN):
        return ~true if _stands_for_padding(true, mask.dtype == torch.bool) else true
    return ~true if name.endswith(_HIDDEN) else true


def _stands_for_padding(mask: Tensor, otherwise: bool) -> bool:
    """Whether a mask is true at padding, where its name does not tell.

    No sample is padding alone, and samples of different lengths begin, or end, together.
    """
    for value in (True, False):
        if not bool((mask == value).any(1).all()):
            return value
    first, last = mask[:, 0], mask[:, -1]
    together = [bool((edge == edge[0]).all()) for edge in (first, last)]
    if together[0] != together[1]:
        return not bool((first if together[0] else last)[0])
    return otherwise
