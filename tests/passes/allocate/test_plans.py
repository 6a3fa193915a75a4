"""Plans as objects: values that go through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tensorize.base.errors import AnalysisError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tests.passes.allocate.programs import BOTH, model_of, plan, trained


def test_plans_are_values() -> None:
    one, two, other = plan(model_of(), 0.4), plan(model_of(), 0.4), plan(model_of(), 0.5)
    assert one == two
    assert hash(one) == hash(two)
    assert one != other
    assert len({one, two, other}) == 2


@pytest.mark.parametrize(
    "budget", [0.4, Budget(params=0.5, flops=0.6, error=0.9), Budget(loss=0.5)]
)
def test_plans_go_through_json(budget: Any) -> None:
    found = plan(model_of(), budget, fingerprint="abc", batch_sizes=(1, 7), ranks={"w1": 99})
    again = Plan.from_json(found.to_json())
    assert again == found
    assert hash(again) == hash(found)
    assert again.to_json() == found.to_json()
    assert (again.fingerprint, again.batch_sizes) == ("abc", (1, 7))
    assert again.budget == str(Budget.of(budget))
    trains = plan(trained(BOTH), 0.3)
    assert Plan.from_json(trains.to_json()) == trains


def test_a_plan_that_was_changed_is_refused_and_an_edited_one_is_taken() -> None:
    found = plan(model_of(), 0.4)
    text = found.to_json()
    changed = text.replace('"seed": 0', '"seed": 1')
    with pytest.raises(AnalysisError, match="without the line of its sha256"):
        Plan.from_json(changed)
    data = json.loads(changed)
    del data["sha256"]
    assert Plan.from_json(json.dumps(data)) == replace(found, seed=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["sites"].append(d["sites"][0]),
        lambda d: d["sites"][0].update(shape=[-1, 5]),
        lambda d: d["sites"][0].update(shape=[2**40, 2**40]),
        lambda d: d["sites"][0]["spec"].update(storage=5),
        lambda d: d["sites"][0]["spec"].update(experts=True),
        lambda d: d["sites"][0]["spec"].update(row_modes=[7, 1]),
        lambda d: d["sites"][0]["spec"].update(row_mode=[7, 1]),
        lambda d: d.update(refine="x"),
        lambda d: d.update(batch_sizes=[0]),
        lambda d: d["dense"].update(bytes=-1),
        lambda d: d["predicted"].update(output_error=True),
        lambda d: d.update(notes="text"),
    ],
)
def test_every_value_of_a_plan_is_checked(change: Any) -> None:
    data = json.loads(plan(model_of(), 0.4).to_json())
    del data["sha256"]
    Plan.from_json(json.dumps(data))
    change(data)
    with pytest.raises(AnalysisError, match="the text is no plan"):
        Plan.from_json(json.dumps(data))


def test_the_same_program_gives_the_same_plan_whatever_was_planned_before() -> None:
    made = model_of()
    first = plan(made, 0.4)
    for budget in (0.9, Budget(error=0.2), Budget(flops=0.3)):
        plan(made, budget)
    assert plan(made, 0.4) == first
