"""The pipeline: one tuple of passes, one observer, and a verifier that catches a broken pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.formats import interpret
from tensorize.ir.plan import RankPlan
from tensorize.ir.spec import TTSpec
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import run_passes
from tensorize.passes.rewrite.factorize import Factorize
from tensorize.passes.rewrite.verify import VerifyResult, check_weight
from tensorize.passes.stages import Found, Given, Learned, Opened, Planned, Record, Rewritten
from tensorize.weight.install import factored
from tests.models import MLP


@dataclass(frozen=True)
class Broken:
    """A pass that changes the stage in a way that must not pass."""

    change: Any
    name: str = "broken"

    def run(self, stage: Record) -> Record:
        return self.change(stage)


def opened() -> Opened:
    model = MLP()
    analysis = tensorize.analyze(model)
    return analysis.program.to(Planned, plan=analysis.plan(0.5)).to(Opened, model=model)


def first_factorized(planned: Planned) -> tuple[int, RankPlan]:
    return next((k, s) for k, s in enumerate(planned.plan.sites) if s.spec is not None)


def with_choice(planned: Planned, k: int, choice: RankPlan) -> Planned:
    sites = [*planned.plan.sites]
    sites[k] = choice
    return replace(planned, plan=replace(planned.plan, sites=tuple(sites)))


def test_a_sound_pass_goes_through_with_its_time_and_summary() -> None:
    found = run_passes(Given(model=MLP()), (FindSites(),), Found)
    (step,) = found.history
    assert step.name == "sites"
    assert step.summary == "2 of 3 weights can be factorized"
    assert step.seconds > 0


def test_a_spec_of_another_shape_is_caught_and_the_pass_is_named() -> None:
    def change(planned: Planned) -> Planned:
        k, choice = first_factorized(planned)
        return with_choice(planned, k, replace(choice, spec=TTSpec.low_rank(3, 4, 1)))

    with pytest.raises(tensorize.AnalysisError, match="'broken' left an invalid stage"):
        run_passes(opened(), (Broken(change),), Planned)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, sites=(*p.sites, p.sites[0])),
        lambda p: p.to(Learned, spectra={"ghost": object()}),
        lambda p: p.to(Rewritten, errors={p.sites[0].name: float("nan")}),
        lambda p: replace(p, sites=tuple(replace(s, blocked="no") for s in p.sites)),
        lambda p: replace(
            p, sites=tuple(replace(s, name=s.name + "x") for s in p.sites), spectra={}
        ),
    ],
    ids=["twice the same site", "unknown site", "NaN error", "blocked", "unknown in the plan"],
)
def test_other_broken_stages_are_caught(change: Any) -> None:
    with pytest.raises(tensorize.AnalysisError, match="broken"):
        run_passes(opened(), (Broken(change),), Record)


def test_a_pipeline_that_ends_elsewhere_is_caught() -> None:
    with pytest.raises(tensorize.AnalysisError, match="it is Found, not Planned"):
        run_passes(Given(model=MLP()), (FindSites(),), Planned)


def test_a_weight_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_passes(opened(), (Factorize(),), Rewritten)
    name, weight = next(iter(factored(done.model)))
    assert check_weight(name, weight) < 1e-5

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(4, weight.shape[0])

    monkeypatch.setattr("tensorize.weight.products.matmul", wrong)
    with pytest.raises(tensorize.AnalysisError, match="differs from the interpreter"):
        check_weight(name, weight)


def test_a_large_weight_is_checked_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_passes(opened(), (Factorize(),), Rewritten)
    name, weight = next(iter(factored(done.model)))
    built: list[int] = []
    apply = interpret.apply

    def noted(spec: Any, *rest: Any) -> torch.Tensor:
        built.append(spec.shape[0])
        return apply(spec, *rest)

    monkeypatch.setattr("tensorize.formats.interpret.apply", noted)
    monkeypatch.setattr("tensorize.passes.rewrite.verify._ENTRIES", 5 * weight.shape[1])
    assert check_weight(name, weight) < 1e-5
    assert max(built) == 5
    assert sum(built) == weight.shape[0]


def test_a_parameter_too_many_is_caught() -> None:
    done = run_passes(opened(), (Factorize(),), Rewritten)
    done.model.smuggled = nn.Parameter(torch.zeros(3))
    with pytest.raises(tensorize.AnalysisError, match="parameters, the plan said"):
        run_passes(done, (VerifyResult(),), Rewritten)


def test_debug_levels_print_stages_and_decisions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorize.compile(MLP(), budget=0.5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TENSORIZE_DEBUG", "1")
    tensorize.compile(MLP(), budget=0.5)
    lines = capsys.readouterr().err
    for stage in ("sites", "spectra", "allocate", "factorize", "verify"):
        assert f"tensorize: {stage}" in lines
    assert "first.weight" not in lines
    monkeypatch.setenv("TENSORIZE_DEBUG", "2")
    tensorize.compile(MLP(), budget=0.5)
    assert "first.weight 96x48 -> low_rank" in capsys.readouterr().err
