"""Moments of few rows are brought closer to the truth."""

from __future__ import annotations

import pytest
import torch

from tensorize.passes.curves.metric import shrinkage, shrinkage_of_noise
from tests.passes.curves.losses import draw


def test_shrinkage_brings_a_moment_of_few_rows_closer_to_the_truth() -> None:
    """Rows from a known second moment: shrunk, the estimate is nearer to it, most where few."""
    width = 40
    basis = torch.linalg.qr(draw((width, width), 1))[0]
    truth = basis @ torch.logspace(0, -1, width, dtype=torch.float64).diag() @ basis.T
    root = torch.linalg.cholesky(truth)
    gains = []
    for samples in (20, 80, 20_000):
        rows = draw((samples, width), samples) @ root.T
        found = rows.T @ rows / samples
        share = shrinkage(found, samples)
        shrunk = (1 - share) * found + share * found.diagonal().diag()
        gains.append(float((shrunk - truth).norm() / (found - truth).norm()))
    assert gains[0] < gains[1] < 1.0
    assert gains[2] == pytest.approx(1.0, abs=0.05)


def test_rows_without_directions_are_shrunk_to_their_sizes() -> None:
    sizes = torch.logspace(0, 4, 30, dtype=torch.float64)
    assert shrinkage(sizes.diag(), 500) == 1.0


def test_a_few_large_entries_do_not_hide_how_noisy_the_others_are() -> None:
    rows = draw((200, 40), 3).double()
    large = rows * torch.where(torch.arange(40) < 2, 300.0, 1.0)
    own, other = (shrinkage(x.T @ x / 200, 200) for x in (rows, large))
    assert other == pytest.approx(own, rel=0.05)


def test_shrinkage_by_noise_brings_a_mean_of_few_matrices_closer_to_the_truth() -> None:
    """Samples of which each has a moment of its own, that many of its rows are alike in."""
    width, identity = 40, torch.eye(40, dtype=torch.float64)
    basis = torch.linalg.qr(draw((width, width), 1))[0]
    truth = basis @ torch.logspace(0, -1, 40, dtype=torch.float64).diag() @ basis.T
    root = torch.linalg.cholesky(truth)
    gains = []
    for samples in (10, 40, 4000):
        rows = draw((samples, 1, width), samples) @ root.T
        each = (rows + 0.1 * draw((samples, 5, width), samples + 1)).float().double()
        moments = each.mT @ each / 5
        found = moments.mean(0)
        spread = (moments - found).square().sum((1, 2)).mean() / samples
        share = shrinkage_of_noise(found, float(spread / found.square().sum()))
        shrunk = (1 - share) * found + share * found.diagonal().diag()
        of_rows = shrinkage(found, 5 * samples)  # as if all rows were independent: too little
        assert share > of_rows
        aim = truth + 0.01 * identity
        gains.append(float((shrunk - aim).norm() / (found - aim).norm()))
    assert gains[0] < gains[1] < 0.9
    assert gains[2] == pytest.approx(1.0, abs=0.1)
