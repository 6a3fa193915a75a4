"""What a module holds in place of its dense weight: the same answers, and no dense matrix.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize  # registers the contraction backend
from tensorize import tt, weight
from tensorize.ir import TTSpec
from tensorize.uses import Frame
from tensorize.weight import Cores, FactoredWeight, LowRankLinear
from tests.test_uses import CALLS, NO_MATMULS

B, T, M, N, E = 4, 3, 6, 5, 3

assert tensorize.__version__


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(
    spec: TTSpec, dtype: torch.dtype = torch.float64, trained: bool = True
) -> list[nn.Parameter]:
    return [
        nn.Parameter(draw(shape, seed, dtype), requires_grad=trained)
        for seed, shape in enumerate(spec.core_shapes)
    ]


def specs_for(shape: tuple[int, ...]) -> list[TTSpec]:
    """Low rank, and where the weight is a plain matrix with factors also trains of 2 and 3 cores."""
    m, n = shape[0] if len(shape) != 3 else shape[-2], shape[-1]
    low = [TTSpec.low_rank(m, n, 2)]
    if (m, n) == (M, N):
        return [*low, TTSpec((2, 3), (5, 1), (4,)), TTSpec((2, 1, 3), (1, 5, 1), (2, 3))]
    return low


def close(got: Tensor, want: Tensor, terms: int = 64) -> None:
    """Equal to the rounding of a few chained sums of ``terms`` products, relative to the largest."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    allowed = 8 * terms * torch.finfo(want.dtype).eps * float(want.abs().max() if want.numel() else 0)
    assert ((got - want).abs() <= allowed + 1e-300).all()


@pytest.fixture
def no_dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Building the dense matrix is an error."""

    def refuse(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
        raise AssertionError(f"the dense matrix of {spec} was built")

    with monkeypatch.context() as patch:
        patch.setattr(tt, "reconstruct", refuse)
        yield patch


def lazy(spec: TTSpec, cores: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Any:
    frame = Frame() if shape is None or shape == spec.shape else Frame(shape=shape)
    return FactoredWeight(spec, tuple(cores), frame)


# ------------------------------------------------------------------------- the table of uses.py

STACKED = [name for name in CALLS if name.startswith("@, a stack")]
CONTRACTED = [name for name in CALLS if name not in STACKED]


@pytest.mark.parametrize("name", CONTRACTED)
def test_every_call_of_the_table_is_a_contraction(
    name: str, no_dense: pytest.MonkeyPatch
) -> None:
    call = CALLS[name]
    rows = call.weight[0]
    columns = 1
    for size in call.weight[1:]:
        columns *= size
    for spec in specs_for((rows, columns)):
        cores = draw_cores(spec)
        got = call.run(lazy(spec, cores, call.weight))
        gradients = torch.autograd.grad(got.square().sum(), cores)
        with no_dense.context() as real:
            real.undo()
        want = call.run(_dense(spec, cores, call.weight))
        expected = torch.autograd.grad(want.square().sum(), cores)
        close(got, want)
        for a, b in zip(gradients, expected, strict=True):
            close(a, b, 256)


_reconstruct = tt.reconstruct


def _dense(spec: TTSpec, cores: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return _reconstruct(spec, cores).reshape(shape)
