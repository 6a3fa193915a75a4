"""Gradient steps on factors: Adam (Kingma & Ba 2015), each step relative to the parameter's size.

What a polish and a healing have in common: how large steps may be, how they grow and shrink over a
run, the copies that they are taken on, and the order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The largest relative step of a core is this times the square root of the damage, measured on two
# trained decoders at damages from .001 to .4: half of it learns slower, twice as much overshoots.
_RATE, _LARGEST_RATE = 0.035, 0.03
_WARM_UP = 0.1
BETAS = (0.9, 0.95)


def rate_for(damage: float) -> float:
    """The largest relative step: a model that is off by little is not to be moved by much."""
    return min(_RATE * math.sqrt(max(damage, 0.0)), _LARGEST_RATE)


def share_of_rate(done: int, steps: int) -> float:
    """The step after ``done`` of ``steps``, as a share of the largest: a warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
    return min(1.0, (done + 1) / (_WARM_UP * steps)) * cosine


def relative_groups(
    parameters: Sequence[Tensor], rate: float, smallest: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one a parameter, whose rate is ``rate`` times its size.

    The size is the root mean square of the entries, at least ``smallest``: biases may be zero.
    """
    sizes = [float(p.detach().float().square().mean().sqrt()) for p in parameters]
    return [
        {"params": [p], "lr": rate * max(size, smallest)}
        for p, size in zip(parameters, sizes, strict=True)
    ]


class Descent:
    """Adam on parameters in place.

    Steps are taken on float32 copies: in half precision small ones would be rounded away.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, smallest: float = 0.0) -> None:
        self.parameters = parameters
        self.masters = [p.detach().float().clone() for p in parameters]
        self.adam = torch.optim.Adam(relative_groups(self.masters, rate, smallest), betas=BETAS)
        self.largest = [group["lr"] for group in self.adam.param_groups]

    def step(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """One step, at a share of the largest rate."""
        for group, lr in zip(self.adam.param_groups, self.largest, strict=True):
            group["lr"] = lr * share
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        self.adam.step()
        write(self.parameters, self.masters)


@contextmanager
def trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters ask for gradients, whatever the model's own weights do."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, asked in zip(parameters, before, strict=True):
            p.requires_grad_(asked)


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters, in the parameters' dtype."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def rounds(count: int, steps: int, seed: int = 0) -> Iterator[int]:
    """Positions of the batches to take: every one in turn, in an order of its own each time."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for position in torch.randperm(count, generator=generator).tolist():
            if done == steps:
                return
            yield position
            done += 1
