"""MPIFA among the peers: its least squares, and what a model gains by them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from benchmarks.mpifa import MIXED, reconstructed, with_reconstruction
from benchmarks.peers import uniform_plan
from tests.models import parameters


def test_both_steps_are_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    how = {"generator": draw, "dtype": torch.float64}
    matrix, right = torch.randn(6, 8, **how), torch.randn(3, 8, **how)
    x, seen = torch.randn(8, 40, **how), torch.randn(8, 40, **how)
    left, second = reconstructed(matrix, right, x @ seen.T, seen @ seen.T)
    outputs = MIXED * matrix @ x + (1 - MIXED) * matrix @ seen
    best = torch.linalg.lstsq((right @ seen).T, outputs.T).solution.T
    torch.testing.assert_close(left, best)
    # V is then the best for this U, but for what holds it near W.
    off = (outputs - left @ second @ seen).norm()
    assert off < (outputs - left @ right @ seen).norm()
    whole = torch.linalg.lstsq(seen.T, outputs.T).solution.T
    torch.testing.assert_close(
        second, torch.linalg.lstsq(left, whole).solution, rtol=1e-3, atol=1e-3
    )


def test_a_model_keeps_its_size_and_loses_less() -> None:
    torch.manual_seed(0)
    sizes = ((24, 48), (48, 48), (48, 24))
    layers = [part for n, m in sizes for part in (nn.Linear(n, m), nn.GELU())]
    model = nn.Sequential(*layers[:-1]).eval()
    data = [torch.randn(64, 24) for _ in range(8)]
    analysis = tensorize.analyze(model, calibration=data, metric="input", progress=False)
    plan = uniform_plan(analysis, model, 0.5, pivots=True)
    cut = tensorize.apply(model, plan, progress=False)
    solved = with_reconstruction(analysis, model, plan)
    assert parameters(solved) == parameters(cut)

    def lost(small: nn.Module) -> Tensor:
        return sum((F.mse_loss(small(x), model(x)) for x in data), torch.zeros(()))

    with torch.no_grad():
        assert lost(solved) < lost(cut)
