"""What every budget promises, of many small models: limits hold, more is never worse, and what an
error names can be had."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tests.models import held_bytes, parameters

Made = tuple[nn.Module, tuple[Tensor, ...]]


class Tied(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids)).relu())


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.weight = nn.Parameter(torch.randn(3, width, 2 * width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        every = torch.bmm(x.expand(3, *x.shape), self.weight)
        return torch.einsum("be,ebo->bo", self.gate(x).softmax(-1), every)


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layer, self.head = kind(width, width, batch_first=True), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def _linears(draw: random.Random) -> Made:
    widths = [draw.choice((6, 10, 16, 24, 32)) for _ in range(draw.randint(2, 5))]
    layers = [nn.Linear(a, b, bias=draw.random() < 0.7) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers), (torch.randn(12, widths[0]),)


def _convolutions(draw: random.Random) -> Made:
    a, b = draw.choice((4, 6, 8)), draw.choice((6, 8, 12))
    layers = nn.Conv2d(3, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3, groups=draw.choice((1, 2)))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * b, 5)), (torch.randn(6, 3, 8, 8),)


def _tied(draw: random.Random) -> Made:
    words, width = draw.choice((20, 40)), draw.choice((8, 12, 16))
    return Tied(words, width), (torch.randint(words, (4, 6)),)


def _attention(draw: random.Random) -> Made:
    width = draw.choice((8, 12, 16))
    return Attention(width), (torch.randn(3, 5, width),)


def _experts(draw: random.Random) -> Made:
    width = draw.choice((8, 12, 16))
    return Experts(width), (torch.randn(12, width),)


def _recurrent(draw: random.Random) -> Made:
    width = draw.choice((8, 12))
    return Recurrent(width, draw.choice((nn.LSTM, nn.GRU))), (torch.randn(4, 5, width),)


KINDS: tuple[Callable[[random.Random], Made], ...] = (
    _linears, _convolutions, _tied, _attention, _experts, _recurrent,
)  # fmt: skip
COSTS = ("params", "bytes", "flops", "latency")
COUNT, PARTS = 200, 10


def drawn(seed: int) -> tuple[nn.Module, tensorize.Analysis, random.Random]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, inputs = draw.choice(KINDS)(draw)
    model = model.to(draw.choice((torch.float32, torch.float32, torch.float64))).eval()
    dtype = next(model.parameters()).dtype
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    options: dict[str, Any] = {"formats": draw.choice((None, None, "low_rank", ("dense", "tt")))}
    if draw.random() < 0.4:
        options["calibration"] = [inputs, tuple(x.flip(0) for x in inputs)]
    else:
        options |= {"metric": "frobenius", "example_inputs": inputs}
    return model, tensorize.analyze(model, **options), draw


def budget_of(draw: random.Random, analysis: tensorize.Analysis) -> Budget:
    """One to three limits of any kind, feasible or not."""
    kinds = [*COSTS, "error", *(["loss"] if analysis.program.predictor else [])]
    limits: dict[str, Any] = {}
    for name in draw.sample(kinds, draw.choice((1, 1, 2, 3))):
        limits[name] = draw.choice((0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0))
        if name == "loss":
            limits[name] = draw.choice((1e-6, 1e-3, 0.1, 1.0))
    return Budget(**limits)


def keeps(plan: tensorize.Plan, budget: Budget) -> None:
    found = plan.predicted
    used = {"params": found.parameters, "bytes": found.bytes, "flops": found.flops}
    used |= {f"latency[{k}]": time for k, time in enumerate(found.latency)}
    for name, limit in budget.limits(plan.dense).items():
        assert used[name] <= limit, f"{name} of {budget}"
    if budget.error is not None:
        assert max((site.predicted_error for site in plan.sites), default=0.0) <= budget.error
    if budget.loss is not None:
        assert found.loss is not None
        assert found.loss <= budget.loss


def named(error: BudgetError, budget: Budget) -> Budget:
    """The budget that an error names, the limits that it says nothing of being as they were."""
    assert error.way_out is not None
    whole = re.search(r"budget=(tensorize\.Budget\([^)]*\)|[\d.]+)", error.way_out)
    if whole is not None:
        return Budget.of(eval(whole[1], {"tensorize": tensorize}))
    one = re.search(r"(\w+)=([\d.e+-]+?),? ", error.way_out + " ")
    assert one is not None, error.way_out
    return replace(
        budget, **{one[1]: float(one[2]) if one[1] in ("error", "loss") else int(one[2])}
    )


def planned(analysis: tensorize.Analysis, budget: Budget) -> tensorize.Plan:
    """The plan for a budget; where that is refused, for what is named instead."""
    try:
        plan = analysis.plan(budget)
    except BudgetError as error:
        budget = named(error, budget)
        plan = analysis.plan(budget)
    keeps(plan, budget)
    return plan


def never_rises(analysis: tensorize.Analysis, draw: random.Random) -> None:
    """More of what was limited is never refused, and never predicted to cost more."""
    names = draw.sample(COSTS, draw.choice((1, 1, 2)))
    before, shares = math.inf, [0.3] * len(names)
    for _ in range(8):
        try:
            found = analysis.plan(Budget(**dict(zip(names, shares, strict=True)))).predicted
        except BudgetError:
            assert before == math.inf, "what was feasible is feasible with more"
        else:
            assert found.loss is not None
            assert found.loss <= before * (1 + 1e-9), (names, shares)
            before = found.loss
        k = draw.randrange(len(names))
        shares[k] = min(1.0, shares[k] + draw.choice((0.002, 0.02, 0.15)))


@pytest.mark.parametrize(
    "part", [pytest.param(k, marks=pytest.mark.slow if k > 0 else ()) for k in range(PARTS)]
)
def test_budgets_keep_what_they_promise(part: int) -> None:
    for seed in range(part, COUNT, PARTS):
        model, analysis, draw = drawn(seed)
        plans = [planned(analysis, budget_of(draw, analysis)) for _ in range(3)]
        if analysis.program.predictor is not None:
            never_rises(analysis, draw)
        if seed % 4 == 0:
            small = tensorize.apply(model, plans[0], refine=None, progress=False)
            assert parameters(small) == plans[0].predicted.parameters
            assert held_bytes(small) == plans[0].predicted.bytes


@pytest.mark.parametrize("formats", ["tt", "block"])
def test_the_flops_that_run_are_those_of_the_plan(formats: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()
    inputs = (torch.zeros(1, 64),)
    analysis = tensorize.analyze(model, metric="frobenius", formats=formats, example_inputs=inputs)
    for share in (0.3, 0.6, 0.9):
        plan = analysis.plan(Budget(flops=share))
        small, most = tensorize.apply(model, plan), 0.0
        for rows in plan.batch_sizes:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                small(torch.randn(rows, 64))
            most = max(most, counter.get_total_flops() / rows)
        assert most <= plan.predicted.flops <= share * plan.dense.flops
