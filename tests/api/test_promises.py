"""What a plan and a report say is so: gaps, formats, what was refined, which weights."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError, BudgetError, TensorizeError
from tensorize.ir.budget import Budget
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.candidates import Points
from tests.api.test_budgets import Recurrent


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def batches(width: int, count: int = 4, rows: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, width) for _ in range(count)]


# ------------------------------------------------------------------------------ more is never worse


def lstm() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Recurrent(12, nn.LSTM), [torch.randn(6, 5, 12) for _ in range(4)]


def gru() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Recurrent(10, nn.GRU), [torch.randn(6, 5, 10) for _ in range(4)]


def normed() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 12, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(72, 6))
    return model.eval(), [torch.randn(6, 8, 8) for _ in range(4)]


@pytest.mark.parametrize("kind", ["params", "flops", "bytes"])
@pytest.mark.parametrize("make", [lstm, gru, normed])
def test_weights_of_last_resort_are_spared_only_where_that_is_cheap(
    make: Callable[[], tuple[nn.Module, list[Tensor]]], kind: str
) -> None:
    model, data = make()
    analysis = tensorize.analyze(model.eval(), calibration=data)
    before = math.inf
    for share in np.linspace(0.3, 1.0, 36):
        try:
            loss = analysis.plan(Budget(**{kind: float(share)})).predicted.loss
        except BudgetError:
            assert before == math.inf
            continue
        assert loss is not None
        assert loss <= before * (1 + 1e-9)
        before = loss
    assert before == 0.0 or kind == "flops"


@pytest.mark.parametrize("kind", ["params", "flops", "bytes"])
def test_a_limit_on_the_loss_holds_beside_one_on_the_size(kind: str) -> None:
    analysis = tensorize.analyze(mlp(24, 16, 10), calibration=batches(24, rows=6))
    kept = 0
    for share in range(20, 100, 4):
        try:
            alone = analysis.plan(Budget(**{kind: share / 100})).predicted.loss
        except BudgetError:
            continue
        assert alone is not None
        for factor in (0.99, 1.01):
            budget = Budget(**{kind: share / 100, "loss": max(factor * alone, 1e-9)})
            try:
                found = analysis.plan(budget).predicted.loss
            except BudgetError:
                assert factor < 1
                continue
            assert found is not None
            assert found <= budget.loss  # type: ignore[operator]
            kept += 1
    assert kept


# ------------------------------------------------------------------------------------------ the gap


def best(points: list[Points], params: float) -> float:
    """The least objective of all choices within so many parameters."""
    costs, objective = np.zeros(1), np.zeros(1)
    for p in points:
        costs = (costs[:, None] + p.costs[:, 0]).ravel()
        objective = (objective[:, None] + p.objective).ravel()
    return float(objective[costs <= params].min())


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_better_than_the_gap_says(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(96, 192, bias=False), nn.Linear(192, 96, bias=False))
    with torch.no_grad():
        for layer in model:
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)  # type: ignore[arg-type]
            fading = torch.exp(-torch.arange(len(s)) / (20.0 + 40 * torch.rand(1)))
            layer.weight.copy_(u * fading @ v)  # type: ignore[operator]
    analysis = tensorize.analyze(
        model,
        metric="frobenius",
        example_inputs=(torch.zeros(1, 96),),
        formats=["low_rank", "dense"],
    )
    for share in np.linspace(0.3, 0.95, 12):
        budget = Budget(params=float(share))
        plan = analysis.plan(budget)
        (*_, points) = Allocate(budget).demand(analysis.program).tiers
        mine = 0.0
        for p, site in zip(points, plan.sites, strict=True):
            chosen = [p.spec(k) == site.spec for k in range(len(p.labels))]
            mine += float(p.objective[chosen.index(True)])
        least = best(list(points), budget.limits(plan.dense)["params"])
        assert 1 - least / mine <= plan.gap + 1e-9


# ------------------------------------------------------------------------------ what an error names


def test_what_is_named_for_a_time_holds_at_every_number_of_rows() -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    options: dict[str, Any] = {"metric": "frobenius", "example_inputs": (torch.zeros(1, 32),)}
    analysis = tensorize.analyze(model, formats="low_rank", **options)
    for limits in ({"latency": 1}, {"latency": 1, "params": 10}, {"latency": 0.1, "error": 1e-3}):
        with pytest.raises(BudgetError) as caught:
            analysis.plan(Budget(**limits))
        named = re.search(r"tensorize\.Budget\([^)]*\)", str(caught.value.way_out))
        assert named is not None
        assert analysis.plan(eval(named[0], {"tensorize": tensorize}))


def test_the_smallest_feasible_value_is_the_smallest() -> None:
    """Where weights of last resort may stay dense, or be rebuilt, whichever takes less."""
    model, data = lstm()
    analysis = tensorize.analyze(
        model.eval(), metric="frobenius", formats="low_rank", example_inputs=(data[0],)
    )
    for name in ("flops", "params"):
        with pytest.raises(BudgetError) as caught:
            analysis.plan(Budget(**{name: 5}))
        found = re.search(r"smallest feasible value is ([\d,]+)", str(caught.value))
        assert found is not None
        least = int(found[1].replace(",", ""))
        assert analysis.plan(Budget(**{name: least}))
        for less in (least - 1, least // 2):
            with pytest.raises(BudgetError):
                analysis.plan(Budget(**{name: less}))


# --------------------------------------------------------------------- formats beside ranks by hand


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16)).eval()


@pytest.mark.parametrize("formats", ["tt", "block", ("tt", "dense"), {"*": "tt"}])
def test_formats_bind_beside_ranks(formats: Any) -> None:
    """A convolution takes low rank only; a pattern leaves it out."""
    options: dict[str, Any] = {"metric": "frobenius", "example_inputs": (torch.zeros(1, 3, 8, 8),)}
    small = tensorize.compile(
        convolutional(), None, ranks={"*": 2}, formats=formats, progress=False, **options
    )
    conv, linear = tensorize.report(small).sites
    assert conv.format == "dense"
    assert "it can take none" in conv.reason
    assert linear.format == ("block" if formats == "block" else "tt")


@pytest.mark.parametrize(
    ("ranks", "formats"), [({"*": 2}, "dense"), ({"0.weight": 2}, "tt"), ({"0": 2}, ("block",))]
)
def test_ranks_that_formats_do_not_allow_are_refused(ranks: Any, formats: Any) -> None:
    options: dict[str, Any] = {"metric": "frobenius", "example_inputs": (torch.zeros(1, 3, 8, 8),)}
    with pytest.raises(AnalysisError, match=r"^0\.weight: ranks\[.*cannot be met") as caught:
        tensorize.compile(convolutional(), None, ranks=ranks, formats=formats, **options)
    assert "formats='low_rank'" in str(caught.value)
    assert tensorize.compile(convolutional(), None, ranks=ranks, formats="low_rank", **options)


# ------------------------------------------------------------------------------------ what was done


def test_a_refit_that_is_not_done_is_told_with_the_reason() -> None:
    analysis = tensorize.analyze(mlp(24, 32, 16), calibration=batches(24))
    for budget in (Budget(error=0.5), 0.5):
        plan = analysis.plan(budget)
        small = tensorize.apply(mlp(24, 32, 16), plan)
        told = [note for note in tensorize.report(small).notes if note.startswith("no refit: ")]
        assert (plan.refine is None) == bool(told)
        assert ("refined by" in str(tensorize.report(small))) == (plan.refine is not None)
        done = tensorize.apply(mlp(24, 32, 16), analysis.plan(0.5), refine="refit")
        assert not any(n.startswith("no refit") for n in tensorize.report(done).notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", [True, False])
def test_another_default_dtype_changes_no_bits(dtype: torch.dtype, data: bool) -> None:
    options: dict[str, Any] = {"calibration": batches(24)} if data else {}

    def compiled() -> list[Tensor]:
        small = tensorize.compile(mlp(24, 32, 16), 0.5, progress=False, **options)
        return [p.detach() for p in small.parameters()]

    first = compiled()
    model = mlp(24, 32, 16)
    torch.set_default_dtype(dtype)
    try:
        small = tensorize.compile(model, 0.5, progress=False, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, small.parameters(), strict=True))


# ------------------------------------------------------------------------------------ which weights


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(torch.randn(4, 24)).sum().backward()
    optimizer.step()


def edited(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0


def cast(model: nn.Module) -> None:
    model.half()


@pytest.mark.parametrize("change", [trained, edited, cast])
def test_a_report_knows_that_parameters_have_changed(change: Callable[[nn.Module], None]) -> None:
    small = tensorize.compile(mlp(24, 32, 16), 0.5, progress=False)
    for same in (small, copy.deepcopy(small)):
        assert not any("changed since" in note for note in tensorize.report(same).notes)
    change(small)
    assert [note for note in tensorize.report(small).notes if "changed since" in note]


@pytest.mark.parametrize("formats", [None, "tt", "low_rank"])
@pytest.mark.parametrize("within", [False, True])
def test_what_is_compressed_already_is_refused(formats: Any, within: bool) -> None:
    small = tensorize.compile(mlp(24, 32, 16), 0.5, formats=formats, progress=False)
    model = nn.Sequential(small, nn.ReLU()) if within else small
    for verb in (tensorize.compile, tensorize.analyze, tensorize.initialize):
        with pytest.raises(TensorizeError, match="compressed already") as caught:
            verb(model)
        assert caught.value.site == ("0.0.weight" if within else "0.weight")
    again = tensorize.compile(tensorize.densify(model), 0.4, progress=False)
    assert not any("core_0" in site.name for site in tensorize.report(again).sites)
