"""Text with padding, a small llama, and what is measured of a compressed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from tests.training.healed_models import models, texts


def padded(count: int = 3, filler: int = 3) -> list[dict[str, Tensor]]:
    """Batches of text of which all but the first row of each is shorter."""
    batches = []
    for ids in texts(count, seed=9):
        mask = torch.ones_like(ids)
        mask[1:, 9:] = 0
        batches.append({"input_ids": ids.where(mask != 0, filler), "attention_mask": mask})
    return batches


def llama() -> tuple[nn.Module, nn.Module]:
    return models("llama")


def measured(model: Any, dense: nn.Module, batches: Any, **options: Any) -> tensorize.Evaluation:
    return tensorize.evaluate(model, dense, batches, time=False, **options)
