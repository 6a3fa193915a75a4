"""What ``precision=`` may be, and what is said where it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensorize
from tensorize.base.errors import AnalysisError, TensorizeError
from tensorize.training.adapt import RankSchedule
from tests.models import CASES, held_bytes

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
