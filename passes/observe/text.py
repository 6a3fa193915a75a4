"""Text that a model reads: the token after each position, and how well it is foreseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.synthetic import is_causal, only_ids
from tensorize.ir.sites import Batch
from tensorize.passes.observe.hidden import IGNORED
from tensorize.passes.observe.outputs import outputs_of


def shifted(ids: Tensor) -> Tensor:
    """The token after each position, none after the last."""
    return F.pad(ids[..., 1:], (0, 1), value=IGNORED)


def next_tokens(batch: Batch, ids: Tensor) -> Tensor:
    """The token after each position of a batch of text, none where its mask hides it."""
    mask = batch.argument("attention_mask")
    hidden = isinstance(mask, Tensor) and mask.shape == ids.shape
    return shifted(ids.masked_fill(mask == 0, IGNORED) if hidden else ids)


def text_loss(
    model: nn.Module, batches: Sequence[Batch], run: Callable[[int], Any]
) -> float | None:
    """The cross-entropy of the text of some batches, in nats a token.

    ``run`` gives the model's outputs for the k-th. None where the model is no decoder, or where
    one of the batches is not the text alone.
    """
    total, tokens = 0.0, 0
    for k, batch in enumerate(batches):
        ids = only_ids(batch)
        if ids is None or batch.argument("labels") is not None:
            return None
        output = outputs_of(run(k), batch, model)[0]
        if not output.logits or output.shape[:-1] != ids.shape:
            return None
        if k == 0 and not is_causal(model, batch, ids):
            return None
        wanted = next_tokens(batch, ids).reshape(-1)[output.places.to(ids.device)]
        counted = wanted != IGNORED
        rows = output.rows[counted.to(output.rows.device)].float()
        found = wanted[counted].to(rows.device)
        total += float(F.cross_entropy(rows, found, reduction="sum"))
        tokens += len(found)
    return total / tokens if tokens else None
