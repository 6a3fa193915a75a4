"""What is not feasible names what is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.sites import Use
from tensorize.ir.spec import LOW_RANK
from tensorize.passes.allocate.candidates import COSTS
from tensorize.passes.stages import Analysed
from tests.passes.allocate.programs import M, N, falling, linear, plan, program


def refused(made: Analysed, budget: Budget | float, **options: Any) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        plan(made, budget, **options)
    assert caught.value.way_out
    return caught.value


def number(pattern: str, error: BudgetError) -> str:
    found = re.search(pattern, str(error))
    assert found, str(error)
    return found.group(1).replace(",", "")


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("share", [0.001, 0.02])
def test_too_small_a_size_names_the_smallest_and_that_one_is_feasible(
    name: str, share: float
) -> None:
    blocked = replace(linear("router"), blocked="excluded by the caller")
    made = program([falling(linear(f"w{k}")) for k in range(3)], [blocked], other=100)
    error = refused(made, Budget(**{name: share}))
    smallest = int(number(r"smallest feasible value is ([\d,]+)", error))
    found = plan(made, Budget(**{name: smallest}))
    figure = "parameters" if name == "params" else name
    assert getattr(found.predicted, figure) == smallest
    refused(made, Budget(**{name: smallest - 1}))
    assert error.site == "router"
    assert "router (" in error.cause
    assert "excluded by the caller" in error.cause
    if name not in ("flops", "communication"):  # of which they cost none
        assert "biases, norms" in error.cause
    advice = number(r"budget=([^\s]+?),? ", error)
    value = eval(advice, {"tensorize": tensorize})
    assert getattr(plan(made, value).predicted, figure) <= 1.01 * smallest


def test_a_forced_choice_larger_than_the_budget_names_what_it_takes() -> None:
    made = program([falling(linear("w")), falling(linear("v"))])
    error = refused(made, 0.5, ranks={"w": "full"})
    smallest = int(number(r"smallest feasible value is ([\d,]+)", error))
    assert smallest == N * (M + N) + (M + N)
    assert "ranks='full'" in error.cause
    found = plan(made, Budget(params=smallest), ranks={"w": "full"})
    assert found.predicted.parameters == smallest


def test_limits_that_exclude_each_other_name_one_that_is_feasible() -> None:
    """A table that is looked up: fewer parameters cost FLOPs that the dense table does not."""
    table = linear("table", uses=(Use("embedding", "lookup"),))
    made = program([falling(table), falling(linear("w"))])
    dense = plan(made, 1.0).dense
    least = 2 * (M + N)  # of w at rank 1; the table is looked up dense
    assert plan(made, Budget(params=0.1, flops=least + 2 * N))  # the table at rank 1
    for flops in (least, least + 2 * N - 1):
        budget = Budget(params=0.1, flops=flops)
        for name in ("params", "flops"):
            assert plan(made, Budget(**{name: getattr(budget, name)}))
        error = refused(made, budget)
        name = number(r"the smallest (\w+) found is", error)
        value = int(number(r"the smallest \w+ found is ([\d,]+)", error))
        met = replace(budget, **{name: value})
        found = plan(made, met)
        assert found.predicted.parameters <= met.limits(dense)["params"]
        assert found.predicted.flops <= met.limits(dense)["flops"]


def test_an_error_that_no_point_reaches_names_the_smallest_of_all_sites() -> None:
    made = program([falling(linear("w"), 4.0), falling(linear("v"), 30.0)])
    options = {"formats": {"w": (LOW_RANK,), "v": (LOW_RANK,)}}
    error = refused(made, Budget(error=1e-4), **options)
    assert error.site == "v"
    value = float(number(r"the smallest is ([\d.e+-]+)", error))
    found = plan(made, Budget(error=value), **options)
    worst = max(site.predicted_error for site in found.sites)
    assert 0.99 * value <= worst <= value


@pytest.mark.parametrize("limits", [{}, {"params": 0.3}])
def test_a_loss_that_no_choice_reaches_names_the_smallest(limits: dict[str, float]) -> None:
    made = program([falling(linear("w"), 64.0), falling(linear("v"), 64.0, size=0.1)])
    options = {"formats": {"w": (LOW_RANK,), "v": (LOW_RANK,)}}
    error = refused(made, Budget(loss=1e-4, **limits), **options)
    assert error.site == "w"
    value = float(number(r"allow loss=([\d.e+-]+)", error))
    found = plan(made, Budget(loss=value, **limits), **options)
    assert found.predicted.loss is not None
    assert 0.95 * value <= found.predicted.loss <= value
