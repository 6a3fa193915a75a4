"""Text that a model reads: the token after each position, and how well it is foreseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.base.tensors import in_rows
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


class TextLoss:
    """The cross-entropy of the text of some batches, in nats a token, as a model is run on them.

    It is None where the model is no decoder, or where one of the batches is not the text alone.
    ``causal`` says whether it is one, where the model is not to be run to see.
    """

    def __init__(self, model: nn.Module, causal: Callable[[], bool] | None = None) -> None:
        self._model, self._says_causal = model, causal
        self._total, self._tokens, self._is_text, self._is_causal = 0.0, 0, True, False

    @property
    def value(self) -> float | None:
        return self._total / self._tokens if self._is_text and self._tokens else None

    def add(self, batch: Batch, result: Any) -> None:
        """Take what the model gave for a batch."""
        self._is_text = self._is_text and self._added(batch, result)

    def _added(self, batch: Batch, result: Any) -> bool:
        ids = only_ids(batch)
        if ids is None or batch.argument("labels") is not None:
            return False
        output = outputs_of(result, batch, self._model)[0]
        if not output.logits or output.shape[:-1] != ids.shape:
            return False
        self._is_causal = self._is_causal or self._sees_causal(batch, ids)
        if not self._is_causal:
            return False
        wanted = next_tokens(batch, ids).reshape(-1)[output.places.to(ids.device)]
        counted = wanted != IGNORED
        rows = output.rows[counted.to(output.rows.device)]
        found = wanted[counted].to(rows.device)
        for some, tokens in in_rows(rows, found.unsqueeze(-1)):
            lost = F.cross_entropy(some.float(), tokens.squeeze(-1), reduction="sum")
            self._total += float(lost)
        self._tokens += len(found)
        return True

    def _sees_causal(self, batch: Batch, ids: Tensor) -> bool:
        says = self._says_causal
        return is_causal(self._model, batch, ids) if says is None else says()
