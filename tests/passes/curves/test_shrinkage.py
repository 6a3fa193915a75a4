"""Moments of few rows are brought closer to the truth."""

from __future__ import annotations

import pytest
import torch

from tensorize.passes.curves.metric import shrinkage, shrinkage_of_noise
from tests.passes.curves.losses import draw


def test_shrinkage_brings_a_moment_of_few_rows_closer_to_the_truth() -> None:
    """Rows from a known second moment: shrunk, the estimate is nearer to it, most where few."""
    width = 40
    truth = torch.logspace(0, -1, width, dtype=torch.float64).diag()
    root, mean = truth.sqrt(), float(truth.diagonal().mean())
    gains = []
    for samples in (20, 80, 20_000):
        rows = draw((samples, width), samples) @ root.T
        found = rows.T @ rows / samples
        share = shrinkage(found, samples)
        shrunk = (1 - share) * found + share * mean * torch.eye(width, dtype=torch.float64)
        gains.append(float((shrunk - truth).norm() / (found - truth).norm()))
    assert gains[0] < gains[1] < 1.0
    assert gains[2] == pytest.approx(1.0, abs=0.05)


def test_rows_without_directions_are_shrunk_to_their_mean() -> None:
    assert shrinkage(torch.eye(30, dtype=torch.float64), 500) == 1.0


def test_shrinkage_by_noise_brings_a_mean_of_few_matrices_closer_to_the_truth() -> None:
    """Samples of which each has a moment of its own, that many of its rows are alike in."""
    width, truth = 40, torch.logspace(0, -1, 40, dtype=torch.float64).diag()
    identity = torch.eye(width, dtype=torch.float64)
    gains = []
    for samples in (10, 40, 4000):
        rows = draw((samples, 1, width), samples) @ truth.sqrt()
        each = (rows + 0.1 * draw((samples, 5, width), samples + 1)).float().double()
        moments = each.mT @ each / 5
        found = moments.mean(0)
        spread = (moments - found).square().sum((1, 2)).mean() / samples
        share = shrinkage_of_noise(found, float(spread / found.square().sum()))
        mean = float(found.diagonal().mean())
        shrunk = (1 - share) * found + share * mean * identity
        of_rows = shrinkage(found, 5 * samples)  # as if all rows were independent: too little
        assert share > of_rows
        aim = truth + 0.01 * identity
        gains.append(float((shrunk - aim).norm() / (found - aim).norm()))
    assert gains[0] < gains[1] < 0.9
    assert gains[2] == pytest.approx(1.0, abs=0.1)
