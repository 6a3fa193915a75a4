"""The pruning that ours is compared with does what its papers say, at the bytes that it states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import prune_peers
from tests.benchmarks.test_bits import lost, weight_and_moment

SHARES = (0.3, 0.5, None)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("method", prune_peers.METHODS)
def test_what_is_said_to_be_kept_is_kept(method: str, share: float | None) -> None:
    weight, moment = weight_and_moment()
    found = prune_peers.METHODS[method](weight, moment, share)
    kept = (found != 0).float()
    if share is None:
        assert bool((kept.view(24, -1, 4).sum(-1) == 2).all())
    else:
        assert float(kept.mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("share", SHARES)
def test_what_knows_more_of_the_inputs_loses_less(share: float | None) -> None:
    weight, moment = weight_and_moment()
    mixed = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(-1, 1, 160).double()[mixed]  # inputs of very different sizes
    moment = moment * scales[:, None] * scales
    order = ("SparseGPT", "Wanda", "magnitude")
    losses = [
        lost(prune_peers.METHODS[name](weight, moment, share) - weight, moment) for name in order
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[1]


def test_feedback_on_inputs_with_nothing_in_common_only_removes() -> None:
    weight, moment = weight_and_moment()
    found = prune_peers.with_feedback(weight, moment.diagonal().diag(), 0.5)
    assert torch.equal(found, torch.where(found != 0, weight, 0))


def test_budgets_are_kept_and_used_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    total = sum(2 * p.numel() for p in model.parameters())
    found = dict(
        prune_peers.configurations("Wanda", model, [torch.arange(64)[None]], (0.5, 0.15, 0.05))
    )
    assert set(found) == {
        *("0.5, ends stay", "2:4, ends stay"),
        *("0.5, everything", "0.15, everything", "0.05, everything", "2:4, everything"),
    }
    for name, changed in found.items():
        budget = name.partition(",")[0]
        if budget != "2:4":
            assert changed.bytes / total == pytest.approx(float(budget), abs=1e-3)
    assert found["2:4, everything"].bytes / total == pytest.approx(0.5625, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
