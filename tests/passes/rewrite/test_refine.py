"""Refining the factors after the decompositions: in closed form, and by gradient steps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError, BudgetError, CaptureError
from tensorize.ir.sites import Batch
from tensorize.passes.curves.metric import damped, shrinkage
from tensorize.passes.observe.loss import split
from tensorize.passes.rewrite.drift import RIDGES, Drift, Sums, best_ridge
from tensorize.passes.rewrite.factorize import planned_cores
from tensorize.passes.rewrite.refit import refit
from tensorize.passes.stages import Learned
from tests.marks import slow
from tests.models import CASES, MLP, relative


class Chain(nn.Module):
    """Three matrices in a row: all that a weight sees comes from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 8) -> list[Tensor]:
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    return [
        torch.randn(64, 24, generator=torch.Generator().manual_seed(k)) @ mix for k in range(count)
    ]


def ready(model: nn.Module, data: list[Tensor], metric: str, rank: int) -> tuple[Learned, Any]:
    analysis = tensorize.analyze(model, calibration=data, metric=metric)
    plan = analysis.plan(None, ranks={"*": rank})
    return analysis.program.to(Learned, model=model), plan.sites


def given(data: list[Tensor]) -> tuple[Batch, ...]:
    return tuple(Batch((x,), {}, x, number=k) for k, x in enumerate(data))


# ------------------------------------------------------------------------------------ the refit


def test_the_first_weight_sees_what_it_always_saw() -> None:
    model, data = Chain(), batches()
    learned, sites = ready(model, data, "input", 5)
    before = planned_cores(learned, sites)
    after = refit(learned, sites, split(given(data))[0])  # the batches that were learnt from
    for name, same in (("a.weight", True), ("b.weight", False), ("c.weight", False)):
        (u, v), (p, q) = before[name], after[name]
        assert torch.allclose(u @ v, p @ q, atol=1e-4) == same


def test_each_weight_is_the_best_of_its_rank_on_what_it_sees() -> None:
    """Against the reduced-rank ridge regression of W x on x̃, in float64 (Izenman 1975)."""
    model, data = Chain(), batches()
    learned, sites = ready(model, data, "input", 5)
    cores = refit(learned, sites, given(data))
    wide = copy.deepcopy(model).double()
    first = (cores["a.weight"][0] @ cores["a.weight"][1]).double()

    def inputs(of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.cat(list(of)).double()
        return torch.tanh(wide.a(x)), torch.tanh(x @ first.T + wide.a.bias)

    def moved(of: Sequence[Tensor], ridge: float) -> Tensor:
        dense, seen = inputs(of)
        own, drift = seen.T @ seen, (dense - seen).T @ seen
        return wide.b.weight + wide.b.weight @ drift @ damped(own, 0.0, ridge).inverse()

    with torch.no_grad():
        learnt, held_out = split(tuple(data))
        dense, seen = inputs(held_out)
        lost = {
            ridge: float((dense @ wide.b.weight.T - seen @ moved(learnt, ridge).T).square().sum())
            for ridge in RIDGES
        }
        assert min(lost.values()) < float(((dense - seen) @ wide.b.weight.T).square().sum())
        _, seen = inputs(data)
        own = seen.T @ seen
        root = torch.linalg.cholesky(damped(own, shrinkage(own, len(seen))))
        target = moved(data, min(lost, key=lost.__getitem__))
        u, s, v = torch.linalg.svd(target @ root)
        best = (u[:, :5] * s[:5]) @ v[:5] @ root.inverse()
    got = cores["b.weight"][0] @ cores["b.weight"][1]
    assert relative(got.double(), best) < 1e-4


def test_what_is_learnt_of_few_rows_and_does_not_hold_elsewhere_is_not_used() -> None:
    """Inputs that drift by noise alone: any map learnt of it loses on other rows."""
    weights = [draw(16, 24, seed=5)]

    def sums(drift: Callable[[Tensor, int], Tensor]) -> list[Sums]:
        found = [Sums(), Sums()]
        for seed, each in enumerate(found):
            x = draw(40, 24, seed=seed)
            each.add(x + drift(x, seed), x)
        return found

    noise = sums(lambda x, seed: draw(40, 24, seed=seed + 10))
    assert best_ridge(*noise, weights, [None]) >= max(RIDGES)
    holds = sums(lambda x, seed: 0.5 * x)
    assert best_ridge(*holds, weights, [None]) == min(RIDGES)


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_a_refit_brings_the_outputs_nearer(metric: str) -> None:
    model, data = Chain(), batches()
    test = torch.cat(batches(12)[8:])
    small = {
        refine: tensorize.compile(
            model, 0.5, calibration=data, metric=metric, refine=refine, include="*.weight"
        )
        for refine in (None, "refit")
    }
    with torch.no_grad():
        errors = {refine: relative(m(test), model(test)) for refine, m in small.items()}
    assert errors["refit"] < errors[None]


@pytest.mark.parametrize("name", ["gpt", slow("bert"), slow("t5"), "mixtral", slow("vit")])
def test_a_refit_leaves_the_model_as_it_was_and_no_thread_behind(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), [case.batch(seed) for seed in range(4)]
    before = copy.deepcopy(model.state_dict())
    threads = threading.active_count()
    small = tensorize.compile(model, 0.6, calibration=data, refine="refit")
    assert threading.active_count() == threads
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert any(step.name == "refit" for step in tensorize.report(small).history)


def test_exact_ranks_stay_exact() -> None:
    model, data = Chain(), batches()
    small = tensorize.compile(model, None, ranks={"*": "full"}, calibration=data, refine="refit")
    with torch.no_grad():
        assert relative(small(data[0]), model(data[0])) < 1e-5


class Group(nn.Module):
    """Three matrices of one input, which changes in place before the last one where asked."""

    def __init__(self, *, changed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24) for _ in range(4))
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        y = self.b(x) + self.c(x)
        if self.changed:
            x.mul_(torch.linspace(-2, 2, 24))
        return y + self.d(x)


@pytest.mark.parametrize("changed", [False, True], ids=["one input", "changed in place"])
def test_weights_of_one_input_share_their_moments(
    monkeypatch: pytest.MonkeyPatch, *, changed: bool
) -> None:
    """To the same bits as each with its own; what was written to in between is another input."""
    model, data = Group(changed=changed), batches(4)
    learned, sites = ready(model, data, "input", 5)
    made: list[str] = []
    plain = Drift.__init__

    def noted(self: Drift, rows: Any, runs: Any, masks: Any) -> None:
        made.append(rows.args[0].name)
        plain(self, rows, runs, masks)

    monkeypatch.setattr(Drift, "__init__", noted)
    shared = refit(learned, sites, given(data))
    assert made == ["a.weight", "b.weight", *(["d.weight"] if changed else [])]
    monkeypatch.setattr(Drift, "are_of", lambda self, runs, masks: False)
    alone = refit(learned, sites, given(data))
    for name, cores in shared.items():
        assert all(torch.equal(a, b) for a, b in zip(cores, alone[name], strict=True)), name


def test_a_weight_that_is_used_twice_keeps_its_factors() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model, data = Twice(), batches(4)
    learned, sites = ready(model, data, "input", 5)
    before, after = planned_cores(learned, sites), refit(learned, sites, given(data))
    for name in before:
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))


class ByLength(nn.Module):
    """Multiplies long inputs by ``a``; short ones by its transpose, or looks them up in it."""

    def __init__(self, short: str) -> None:
        super().__init__()
        self.a, self.b, self.short = nn.Linear(24, 24), nn.Linear(24, 24), short

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 64:
            x = self.a(x)
        elif self.short == "rows":
            x = x @ self.a.weight
        else:
            x = nn.functional.embedding(x.argmax(-1), self.a.weight)
        return self.b(torch.tanh(x))


@pytest.mark.parametrize("short", ["rows", "lookup"])
def test_a_weight_that_some_data_use_in_another_way_keeps_its_factors(short: str) -> None:
    model, data = ByLength(short), batches(8)
    data = data[:4] + [x[:32] for x in data[4:]]
    learned, sites = ready(model, data, "input", 5)
    before, after = planned_cores(learned, sites), refit(learned, sites, given(data))
    kept = {n: relative(after[n][0], before[n][0]) < 1e-6 for n in before}
    assert kept == {"a.weight": True, "b.weight": False}


@pytest.mark.parametrize("short", ["rows", "lookup"])
def test_a_refit_leaves_out_a_use_that_it_did_not_begin_with(
    short: str,
) -> None:
    model, data = ByLength(short), batches(4)
    learned, sites = ready(model, data, "input", 5)
    cores = refit(learned, sites, given(data))["a.weight"]
    more = refit(learned, sites, given([*data, data[0][:32]]))["a.weight"]
    assert all(torch.equal(one, other) for one, other in zip(cores, more, strict=True))


def test_an_error_in_a_batch_names_it_and_ends_every_thread() -> None:
    class Fussy(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.a(x))
            if len(x) == 3:
                raise ValueError("three rows")
            return self.c(torch.tanh(self.b(y)))

    model, data = Fussy(), batches(4)
    learned, sites = ready(model, data, "input", 5)
    threads = threading.active_count()
    with pytest.raises(CaptureError, match="batch 4 does not fit"):
        refit(learned, sites, given([*data, torch.randn(3, 24)]))
    assert threading.active_count() == threads


def test_a_weight_that_only_zeros_reach_keeps_its_factors() -> None:
    model, data = Chain(), batches()
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.zero_()
    learned, sites = ready(model, data, "input", 5)
    before, after = planned_cores(learned, sites), refit(learned, sites, given(data))
    assert all(map(torch.equal, before["b.weight"], after["b.weight"]))


# ----------------------------------------------------------------------------------- the polish


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
def test_a_polish_brings_the_outputs_nearer_still(dtype: torch.dtype) -> None:
    model, data = Chain().to(dtype), [x.to(dtype) for x in batches(24)]
    test = torch.cat(batches(28)[24:]).to(dtype)
    model.requires_grad_(False)
    result = {}
    for refine in ("refit", "polish"):
        small = tensorize.compile(model, 0.5, calibration=data, refine=refine)
        assert not any(p.requires_grad or p.grad is not None for p in small.parameters())
        result[refine] = relative(small(test).float(), model(test).float())
    assert result["polish"] < result["refit"]


def test_a_polish_in_place_equals_one_of_a_copy() -> None:
    model, data = Chain(), batches(4)
    small = tensorize.compile(model, 0.5, calibration=data, refine="polish")
    also = tensorize.compile(model, 0.5, calibration=data, refine="polish", inplace=True)
    assert also is model
    assert torch.equal(small(data[0]), also(data[0]))


def test_the_report_says_what_was_gained() -> None:
    small = tensorize.compile(Chain(), 0.5, calibration=batches(), refine="polish")
    report = tensorize.report(small)
    assert report.plan.refine == "polish"
    polish = next(step for step in report.history if step.name == "polish")
    assert "64 steps" in polish.summary
    for site in report.sites:
        if site.format != "dense":
            assert 0 < site.actual_error < 2 * site.predicted_error


# ---------------------------------------------------------------------------- what is asked for


def test_without_data_nothing_is_refined() -> None:
    plan = tensorize.analyze(MLP()).plan(0.5)
    assert plan.refine is None
    with pytest.raises(AnalysisError, match="needs calibration data"):
        tensorize.analyze(MLP()).plan(0.5, refine="refit")


def test_a_limit_on_errors_is_of_the_factors_as_they_come() -> None:
    analysis = tensorize.analyze(Chain(), calibration=batches())
    budget = tensorize.Budget(params=0.9, error=0.8)
    assert analysis.plan(budget).refine is None
    with pytest.raises(BudgetError, match="moves errors between weights"):
        analysis.plan(budget, refine="refit")


def test_a_polish_that_was_not_measured_is_not_predicted() -> None:
    analysis = tensorize.analyze(Chain(), calibration=batches())
    with pytest.raises(AnalysisError, match="refine='polish'"):
        analysis.plan(0.5, refine="polish")
    with pytest.raises(AnalysisError, match="not one of"):
        analysis.plan(0.5, refine="heal")


def test_a_plan_from_json_needs_the_data_again() -> None:
    model, data = Chain(), batches()
    plan = tensorize.analyze(model, calibration=data).plan(0.5)
    read = tensorize.Plan.from_json(plan.to_json())
    assert read == plan
    assert read.refine == "refit"
    with pytest.raises(AnalysisError, match="calibration"):
        tensorize.apply(model, read)
    want, got = tensorize.apply(model, plan), tensorize.apply(model, read, calibration=data)
    assert torch.equal(want(data[0]), got(data[0]))
