"""What ``precision=`` may be, and what is said where it may not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tensorize
from tensorize.base.errors import AnalysisError, TensorizeError
from tensorize.training.adapt import RankSchedule
from tensorize.weight.install import factored
from tests.models import CASES, held_bytes, relative

MLP = CASES["mlp"]


def compiled(precision: Any, budget: float = 0.3) -> Any:
    return tensorize.compile(
        MLP.model(), budget, example_inputs=MLP.batch(), metric="frobenius", precision=precision
    )


def test_a_name_that_is_none() -> None:
    with pytest.raises(AnalysisError, match=r"int5(.|\n)*int8, int4"):
        compiled("int5")


@pytest.mark.parametrize("precision", ["bfloat16", ("bfloat16", "int4")])
def test_a_dtype_that_the_weights_do_not_have(precision: Any) -> None:
    with pytest.raises(AnalysisError, match=r"float32(.|\n)*model.to\(torch.bfloat16\)"):
        compiled(precision)


def test_one_that_was_not_analysed() -> None:
    analysis = tensorize.analyze(
        MLP.model(), example_inputs=MLP.batch(), metric="frobenius", precision="int8"
    )
    with pytest.raises(AnalysisError, match=r"int4(.|\n)*precision=\('int8', 'int4'\)"):
        analysis.plan(0.3, precision="int4")
    with pytest.raises(AnalysisError, match="bfloat16"):
        analysis.plan(0.3, precision="bfloat16")
    kept = analysis.plan(0.9, precision="float32")
    assert all(site.precision is None for site in kept.sites)


def test_ranks_are_of_the_own_dtype() -> None:
    analysis = tensorize.analyze(
        MLP.model(), example_inputs=MLP.batch(), metric="frobenius", precision="auto"
    )
    with pytest.raises(AnalysisError, match=r"ranks=(.|\n)*without precision="):
        analysis.plan(None, ranks={"*": 4}, precision="int8")
    found = analysis.plan(None, ranks={"*": 4})
    assert all(site.precision is None for site in found.sites)


@pytest.mark.parametrize("precision", ["int8", ("int4", "int2")])
def test_no_weight_keeps_its_own_where_that_is_not_among_them(precision: Any) -> None:
    sites = tensorize.report(compiled(precision)).sites
    assert {site.precision for site in sites} <= set(
        (precision,) if isinstance(precision, str) else precision
    )


def test_a_share_is_one_of_the_bytes() -> None:
    small = compiled("auto", 0.2)
    totals = tensorize.report(small).totals
    assert totals.share.bytes <= 0.2
    assert totals.after.bytes == held_bytes(small)


def test_ranks_of_integers_stay() -> None:
    small = compiled("int4")
    optimizer = torch.optim.Adam(small.parameters())
    with pytest.raises(TensorizeError, match="integers of a few bits"):
        RankSchedule(small, optimizer, 0.2, start=1, end=5)


def test_a_preview_of_a_compiled_graph_takes_it() -> None:
    x = torch.randn(4, 48)
    model = MLP.model()
    options = {"budget": 0.3, "precision": "int8", "inner": "eager"}
    found = torch.compile(model, backend="tensorize", options=options)
    with torch.no_grad():
        assert found(x).shape == model(x).shape
    torch._dynamo.reset()


def test_an_evaluation_counts_the_numbers() -> None:
    model, small = MLP.model(), compiled("int8", 0.4)
    batches = [MLP.batch(seed) for seed in range(2)]
    found = tensorize.evaluate(small, model, batches, time=False)
    (ours,) = found.models
    assert ours.parameters == tensorize.report(small).totals.after.parameters


def test_a_plan_says_what_other_precisions_would_lose() -> None:
    how = {"example_inputs": MLP.batch(), "metric": "frobenius", "precision": "auto"}
    analysis = tensorize.analyze(MLP.model(), **how)
    budget = tensorize.Budget(stored=0.3)
    alone, every = "ranks alone are predicted", "all precisions are predicted"

    def said(precision: Any) -> str:
        return " ".join(analysis.plan(budget, precision=precision).notes)

    assert alone in said("auto")
    assert every not in said("auto")
    assert alone in said("int8")
    assert every in said("int8")
    assert every in said(None)
    assert alone not in said(None)


def test_graphs_say_how_many_bits_a_weight_has() -> None:
    small = compiled("int4")
    found = tensorize.graphs(small, example_inputs=MLP.batch())
    assert "int4" in found.print_readable()
    assert "int4" in found.diff()


@pytest.mark.parametrize("activations", ["float", "int8", "int16"])
def test_inputs_are_rounded_as_was_asked(activations: str) -> None:
    small = tensorize.compile(
        MLP.model(), 0.3, example_inputs=MLP.batch(), metric="frobenius",
        precision=("int8", "int4"), activations=activations,
    )  # fmt: skip
    specs = [weight.spec for _, weight in factored(small)]
    assert {spec.inputs for spec in specs} == {activations}
    with torch.no_grad():
        (x,) = MLP.batch()
        wanted = tensorize.densify(copy.deepcopy(small))(x)
        off = {"float": 1e-5, "int8": 0.02, "int16": 0.02}[activations]
        assert relative(small(x), wanted) < off
    again = tensorize.Plan.from_json(tensorize.report(small).plan.to_json())
    assert [choice.spec for choice in again.sites if choice.spec] == specs
