"""A dense decoder and its compressed form, text for them, and how far apart they are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.training import healing
from tensorize.weight.install import core_names, factored
from tests.models import CASES


class Noisy(nn.Module):
    """Two layers with noise between them in every mode: each call draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 64)
        self.down = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(torch.relu(self.up(x)), 0.1, training=True))


def decoder(name: str = "gpt") -> nn.Module:
    """A decoder with new weights, large enough that its predictions are sharp."""
    model = CASES[name].model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def texts(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (4, 16), generator=generator) for _ in range(count)]


def divergence(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """KL in nats a token, by torch's own function."""
    with torch.no_grad():
        pairs = [
            (model(x).logits.log_softmax(-1), dense(x).logits.log_softmax(-1)) for x in batches
        ]
    q, p = (torch.cat(side).flatten(0, 1).double() for side in zip(*pairs, strict=True))
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True))


@functools.cache
def pair(name: str = "gpt") -> tuple[nn.Module, nn.Module]:
    dense = decoder(name)
    return dense, tensorize.compile(dense, 0.5, calibration=texts(3, seed=5))


def models(name: str = "gpt", *, pivoted: bool | None = None) -> tuple[nn.Module, nn.Module]:
    """A dense decoder, and a copy of its compressed form: as compiled, or low rank in one form."""
    dense, small = pair(name)
    small = copy.deepcopy(small)
    if pivoted is None:
        return dense, small
    return dense, tensorize.weight.pivoted(small) if pivoted else tensorize.weight.plain(small)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def cores(model: nn.Module) -> set[str]:
    return {core for name, _ in factored(model) for core in core_names(model, name)}


def noisy_run(
    directory: str | Path | None, progress: Callable[[str, int, int], None] | bool = False
) -> tuple[healing.Healing, nn.Module]:
    """A healing of a model that draws random numbers; few batches, so that the order matters."""
    torch.manual_seed(0)
    dense = Noisy().eval()
    data = [torch.randn(32, 24) for _ in range(5)]
    small = tensorize.compile(dense, 0.6, metric="frobenius")
    done = tensorize.heal(
        small, dense, data, steps=40, train="all", checkpoint_dir=directory, progress=progress
    )
    return done, small
