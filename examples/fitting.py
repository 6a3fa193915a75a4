"""The training of the examples: AdamW with one cycle of its rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, *, rate: float, decay: float = 1e-2
) -> float:
    """Train on a loss that draws a batch of its own each time; the mean of the last twentieth.

    Args:
        rate: of AdamW, where the cycle is highest.
        decay: of the weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        now = loss()
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
        schedule.step()
        losses.append(now.item())
    model.eval()
    last = losses[-max(steps // 20, 1) :]
    return sum(last) / len(last)
