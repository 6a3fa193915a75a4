"""The pipeline: one tuple of passes, one observer, and a verifier that catches a broken pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.ir.plan import RankPlan
from tensorize.ir.spec import TTSpec
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import Program, run_passes
from tensorize.passes.rewrite.factorize import Factorize
from tensorize.passes.rewrite.verify import VerifyResult, check_weight
from tensorize.weight.install import factored
from tests.models import MLP


@dataclass(frozen=True)
class Broken:
    """A pass that changes the program in a way that must not pass."""

    change: Any
    name: str = "broken"

    def run(self, program: Program) -> Program:
        return self.change(program)


def analysed() -> tuple[MLP, Program]:
    model = MLP()
    analysis = tensorize.analyze(model)
    plan = analysis.plan(0.5)
    return model, replace(analysis.program, model=model, plan=plan)


def first_factorized(program: Program) -> tuple[int, RankPlan]:
    assert program.plan is not None
    return next((k, s) for k, s in enumerate(program.plan.sites) if s.spec is not None)


def with_choice(program: Program, k: int, choice: RankPlan) -> Program:
    assert program.plan is not None
    sites = [*program.plan.sites]
    sites[k] = choice
    return replace(program, plan=replace(program.plan, sites=tuple(sites)))


def test_a_sound_pass_goes_through_with_its_time_and_summary() -> None:
    program = run_passes(Program(MLP()), (FindSites(),))
    (step,) = program.history
    assert step.name == "sites"
    assert step.summary == "2 of 3 weights can be factorized"
    assert step.seconds > 0


def test_a_spec_of_another_shape_is_caught_and_the_pass_is_named() -> None:
    _, program = analysed()

    def change(program: Program) -> Program:
        k, choice = first_factorized(program)
        return with_choice(program, k, replace(choice, spec=TTSpec.low_rank(3, 4, 1)))

    with pytest.raises(tensorize.AnalysisError, match="'broken' left an invalid program"):
        run_passes(program, (Broken(change),))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, sites=(*p.sites, p.sites[0])),
        lambda p: replace(p, statistics={"ghost": object()}),
        lambda p: replace(p, errors={p.sites[0].name: float("nan")}),
        lambda p: replace(p, sites=tuple(replace(s, blocked="no") for s in p.sites)),
        lambda p: replace(
            p, sites=tuple(replace(s, name=s.name + "x") for s in p.sites), spectra={}
        ),
    ],
    ids=["twice the same site", "unknown site", "NaN error", "blocked", "unknown in the plan"],
)
def test_other_broken_programs_are_caught(change: Any) -> None:
    _, program = analysed()
    with pytest.raises(tensorize.AnalysisError, match="broken"):
        run_passes(program, (Broken(change),))


def test_a_weight_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = analysed()
    run_passes(program, (Factorize(),))
    name, weight = next(iter(factored(model)))
    assert check_weight(name, weight) < 1e-5

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(4, weight.shape[0])

    monkeypatch.setattr("tensorize.weight.products.matmul", wrong)
    with pytest.raises(tensorize.AnalysisError, match="differs from the interpreter"):
        check_weight(name, weight)


def test_a_parameter_too_many_is_caught() -> None:
    model, program = analysed()
    program = run_passes(program, (Factorize(),))
    model.smuggled = nn.Parameter(torch.zeros(3))
    with pytest.raises(tensorize.AnalysisError, match="parameters, the plan said"):
        run_passes(program, (VerifyResult(),))


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
