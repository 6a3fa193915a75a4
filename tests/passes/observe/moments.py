"""Moments of a small model, and what they should be by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.capture.inputs import batch_of
from tensorize.passes.observe.counted import CountRows
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.moments import Moments, Term
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.stages import Given, Observed


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def collect(
    model: nn.Module,
    batches: Sequence[Any],
    metric: str = "loss",
    *,
    loss_fn: Any = None,
    seed: int = 0,
    by_sample: bool = True,
) -> dict[str, Moments]:
    """The moments of every site; the pipeline up to and with ``statistics``."""
    program = run(model, batches, metric, loss_fn=loss_fn, seed=seed, by_sample=by_sample)
    return dict(program.statistics)


def run(
    model: nn.Module,
    given: Sequence[Any],
    metric: str,
    *,
    loss_fn: Any = None,
    seed: int = 0,
    by_sample: bool = True,
) -> Observed:
    batches = tuple(batch_of(value) for value in given)
    given_model = Given(
        model=model, inputs=batches[0], calibration=batches, metric=metric, seed=seed
    )
    loss = PreservedLoss.fit(model, batches, loss_fn) if metric == "loss" else None
    found = CountRows(batches, loss_fn).run(FindSites().run(given_model))
    return CollectStatistics(batches, loss, most_probes=1, by_sample=by_sample).run(found)


def the_term(moments: Moments) -> Term:
    (term,) = moments.terms.values()
    return term


def second_moment(rows: Tensor) -> Tensor:
    """Mean of x xᵀ, one row at a time."""
    rows = rows.double().reshape(-1, rows.shape[-1])
    return torch.stack([torch.outer(x, x) for x in rows]).mean(0)


def close(got: Tensor | None, want: Tensor | None, dtype: torch.dtype = torch.float64) -> None:
    """Equal to the rounding of sums of at most some thousands of products."""
    if want is None or got is None:
        assert got is want
        return
    assert got.shape == want.shape
    allowed = 1e4 * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= allowed


def same(one: dict[str, Moments], two: dict[str, Moments], dtype: torch.dtype) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].terms.keys() == two[name].terms.keys(), name
        for contract, term in one[name].terms.items():
            other = two[name].terms[contract]
            assert term.input_rows == other.input_rows, name
            close(term.rows, other.rows, dtype)
            close(term.columns, other.columns, dtype)


@dataclass
class Logits:
    logits: Tensor


class Classifier(nn.Module):
    """Two layers, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.second(torch.tanh(self.first(x))))


def predicted(term: Term, delta: Tensor) -> float:
    """½ tr(G ΔW C ΔWᵀ), for several matrices their sum."""

    def full(moment: Tensor | None, width: int) -> Tensor:
        if moment is None:
            return torch.eye(width, dtype=torch.float64)
        return (moment.diag() if moment.dim() == 1 else moment).double()

    rows, columns = full(term.rows, delta.shape[-2]), full(term.columns, delta.shape[-1])
    return 0.5 * float((rows @ delta * (delta @ columns)).sum())


class Touchy(nn.Module):
    """Batch norm, dropout, a buffer that counts calls, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.second = nn.Linear(6, 3)
        self.second.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.drop(self.norm(self.first(x))) + 0 * torch.rand(()))


def touchy() -> Touchy:
    model = Touchy()
    model(draw((8, 5)).float()).sum().backward()  # gradients of the caller's own
    model.train()
    model.drop.eval()
    return model
