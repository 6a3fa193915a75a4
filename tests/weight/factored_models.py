"""Small models of every kind of layer, and their weights in cores.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.algebra.reconstruct import reconstruct
from tensorize.capture.matmul import Frame
from tensorize.formats.format import Chain
from tensorize.ir.spec import TTSpec
from tensorize.weight.contractions import contractions
from tensorize.weight.install import install
from tensorize.weight.lazy import FactoredWeight
from tests.capture.calls import IDS

B, T, M, N, E = 4, 3, 6, 5, 3


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(s, seed, dtype)) for seed, s in enumerate(spec.core_shapes)]


def lazy(spec: TTSpec, cores: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Any:
    frame = Frame() if shape in (None, spec.shape) else Frame(shape=shape)
    return FactoredWeight(spec, tuple(cores), frame, contractions(spec))


@contextlib.contextmanager
def no_dense() -> Iterator[None]:
    """Building the dense matrix is an error here."""

    def refuse(form: Chain, spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
        raise AssertionError(f"the dense matrix of {spec} was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "reconstruct", refuse)
        yield


def close(got: Tensor, want: Tensor, terms: int = 64) -> None:
    """Equal to the rounding of chained sums of ``terms`` products, relative to the largest."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    largest = float(want.detach().abs().max()) if want.numel() else 0.0
    allowed = 8 * terms * torch.finfo(want.dtype).eps * max(largest, 1.0)
    assert ((got - want).abs() <= allowed).all()


class Tied(nn.Module):
    """A head that is the embedding, and knows it by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(M, N)
        self.head = nn.Linear(N, M, bias=False)
        self.double()
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def tied() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Tied(), {"embedding.weight": ("embedding.weight", "head.weight")}, IDS


def spec_of(parameter: Tensor) -> TTSpec:
    shape = tuple(parameter.shape)
    if len(shape) == 3:
        return TTSpec.low_rank(*shape[1:], 2, experts=shape[0])
    return TTSpec.low_rank(shape[0], math.prod(shape[1:]), 2)


def factorize(
    model: nn.Module, names: dict[str, tuple[str, ...]], train: bool = False
) -> nn.Module:
    """Install random cores in place, and return a dense model with the same weights."""
    oracle = copy.deepcopy(model)
    parameters, dense = dict(model.named_parameters()), dict(oracle.named_parameters())
    for name, aliases in names.items():
        parameter = parameters[name]
        train = train and len(parameter.shape) == 2
        spec = TTSpec((parameter.shape[0], 1), (N, 1), (2,)) if train else spec_of(parameter)
        cores = draw_cores(spec, parameter.dtype)
        with torch.no_grad():
            dense[name].copy_(reconstruct(spec, cores).reshape(parameter.shape))
        install(model, aliases, spec, cores)
    return oracle


class Grouped(nn.Module):
    """Grouped queries and a gated layer, whose weights of one input read nearly the same of it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": 48, "k": 16, "v": 16, "gate": 64, "up": 64}
        for name, rows in sizes.items():
            setattr(self, name, nn.Linear(48, rows, bias=name == "k"))
        self.out, self.down = nn.Linear(48, 48), nn.Linear(64, 48)
        with torch.no_grad():
            for names in (("q", "k", "v"), ("gate", "up")):
                space = torch.randn(24, 48)
                for name in names:
                    weight = self.get_submodule(name).weight
                    weight.copy_(torch.randn(len(weight), 24) @ space / 40 + 0.1 * weight)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.k(x) * self.v(x)).repeat(*[1] * (x.dim() - 1), 3)
        x = x + self.out(torch.tanh(self.q(x)) + heads)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def grouped(seed: int = 0) -> Grouped:
    torch.manual_seed(seed)
    return Grouped().eval()
