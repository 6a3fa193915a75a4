"""The result of ``compile`` is used like any other module: every tool of PyTorch still works.

One small model holds every form of a rewritten weight: a linear that became two, and owners with a
lazy weight: tables in low rank and as a tensor train, a bare parameter, a linear and a packed
attention that keep their own forward, a convolution, a stack of experts.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize import tt, weight
from tests.models import relative

WORDS, WIDTH, HIDDEN, EXPERTS = 64, 32, 40, 4


class Mixed(nn.Module):
    """Words in, a score for every word out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(48, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.bare = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 6)
        self.train_of_cores = nn.Linear(HIDDEN, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        return self.after_words(self.words(ids)) / temperature

    def after_words(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mix(self.norm(x).mT).mT
        x = x + self.train_of_cores(F.gelu(F.linear(x, self.bare)))
        rows = x.reshape(1, -1, WIDTH).expand(EXPERTS, -1, -1)
        x = x + torch.bmm(rows, self.experts).mean(0).view_as(x)
        return self.head(x) * self.scale


RANKS = {
    "words.weight": 8, "places.weight": 4, "attention.*": 8, "mix.weight": 8, "bare": 8,
    "train_of_cores.weight": 4, "experts": 4, "head.weight": 8,
}  # fmt: skip
FORMS = {"places.weight": "tt", "train_of_cores.weight": "tt", "*": "low_rank"}


def words(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (batch, length), generator=generator)


@functools.cache
def _made() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Mixed().eval()
    small = tensorize.compile(
        model, None, example_inputs=(words(),), ranks=RANKS, formats=FORMS
    )
    return model, small


def dense() -> nn.Module:
    return copy.deepcopy(_made()[0])


def small() -> nn.Module:
    return copy.deepcopy(_made()[1])


def test_the_model_holds_every_form() -> None:
    report = tensorize.report(small())
    forms = {site.name: site.format for site in report.sites}
    assert forms == {
        "words.weight": "low_rank", "places.weight": "tt", "attention.in_proj_weight": "low_rank",
        "attention.out_proj.weight": "low_rank", "mix.weight": "low_rank", "bare": "low_rank",
        "train_of_cores.weight": "tt", "experts": "low_rank", "head.weight": "low_rank",
    }  # fmt: skip
