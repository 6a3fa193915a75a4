"""One small model that holds every form of a rewritten weight.

A linear that became two, and owners with a lazy weight: tables in low rank and as a tensor train,
a linear as a train, a bare parameter, packed attention, a convolution, a stack of experts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tests.models import relative

WORDS, WIDTH, HIDDEN, EXPERTS, LENGTH = 64, 32, 40, 4, 48


class Mixed(nn.Module):
    """Words in, a score for every word out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.bare = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 6)
        self.chain = nn.Linear(HIDDEN, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        return self.after_words(self.words(ids)) / temperature

    def after_words(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mix(self.norm(x).mT).mT
        x = x + self.chain(F.gelu(F.linear(x, self.bare)))
        rows = x.reshape(1, -1, WIDTH).expand(EXPERTS, -1, -1)
        x = x + torch.bmm(rows, self.experts).mean(0).view_as(x)
        return self.head(x) * self.scale


FORMS = {
    "words.weight": "low_rank", "places.weight": "tt", "attention.in_proj_weight": "low_rank",
    "attention.out_proj.weight": "low_rank", "mix.weight": "low_rank", "bare": "low_rank",
    "chain.weight": "tt", "experts": "low_rank", "head.weight": "low_rank",
}  # fmt: skip


def words(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (batch, length), generator=generator)


IDS = words()


@functools.cache
def _made() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Mixed().eval()
    ranks = dict.fromkeys(FORMS, 6)
    return model, tensorize.compile(
        model, None, example_inputs=(IDS,), ranks=ranks, formats={**FORMS}
    )


def dense() -> Any:
    return copy.deepcopy(_made()[0])


def small(pivoted: bool | None = None) -> Any:
    """As it was compiled, or with low rank in one form."""
    model = copy.deepcopy(_made()[1])
    if pivoted is None:
        return model
    return tensorize.weight.pivoted(model) if pivoted else tensorize.weight.plain(model)


def scores(model: Callable[..., Tensor], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)


def loss(model: Callable[..., Tensor], ids: Tensor = IDS) -> Tensor:
    return model(ids).square().mean()


def gradients(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model, ids), parameters), strict=True))


def close(got: dict[str, Tensor], want: dict[str, Tensor], within: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    assert max(relative(got[name], want[name]) for name in want) < within


# Parts of torch warn of themselves.
ignore = pytest.mark.filterwarnings
