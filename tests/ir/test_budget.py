"""What a budget says, and what it refuses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Totals

DENSE = Totals(parameters=1000, bytes=4000, flops=900)

quick = settings(max_examples=200, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------- what it says


def test_a_float_is_a_share_of_the_dense_model() -> None:
    assert Budget.of(0.25).limits(DENSE) == {"params": 250}
    assert Budget(bytes=0.5).limits(DENSE) == {"bytes": 2000}
    assert Budget(flops=0.1).limits(DENSE) == {"flops": 90}
    assert Budget.of(1.0).limits(DENSE) == {"params": 1000}


def test_an_int_is_an_absolute_value() -> None:
    assert Budget(params=250).limits(DENSE) == {"params": 250}
    assert Budget(bytes=1).limits(DENSE) == {"bytes": 1}
    # Larger than the model is no mistake: the limit is met by leaving the model as it is.
    assert Budget(flops=10**15).limits(DENSE) == {"flops": 10**15}


def test_several_limits_hold_at_once() -> None:
    budget = Budget(params=0.5, bytes=1000, flops=0.25)
    assert budget.limits(DENSE) == {"params": 500, "bytes": 1000, "flops": 225}


def test_error_and_loss_are_no_costs() -> None:
    assert Budget(error=0.1, loss=0.02).limits(DENSE) == {}


def test_a_share_is_rounded_down_but_not_by_the_rounding_of_floats() -> None:
    assert 0.07 * 100 > 7
    assert 0.29 * 100 < 29
    for percent in range(1, 101):
        limits = Budget.of(percent / 100).limits(Totals(100, 400, 0))
        assert limits == {"params": percent}
    assert Budget.of(0.079).limits(Totals(100, 400, 0)) == {"params": 7}


@quick
@given(st.integers(1, 1000), st.integers(1, 10**14))
def test_a_share_of_any_model_is_the_floor_of_the_decimal_that_was_written(
    thousandths: int, whole: int
) -> None:
    limit = Budget.of(thousandths / 1000).limits(Totals(whole, whole, whole))["params"]
    assert limit == math.floor(Fraction(thousandths, 1000) * whole)


@quick
@given(st.floats(1e-9, 1.0), st.integers(1, 10**14))
def test_a_limit_is_never_more_than_the_share(share: float, whole: int) -> None:
    limit = Budget.of(share).limits(Totals(whole, whole, whole))["params"]
    assert 0 <= limit <= whole
    assert limit <= Fraction(str(share)) * whole < limit + 1


def test_a_budget_is_taken_as_it_is() -> None:
    budget = Budget(params=0.5, flops=7)
    assert Budget.of(budget) is budget
    assert hash(budget) == hash(Budget(params=0.5, flops=7))


def test_it_prints_only_what_was_given() -> None:
    assert str(Budget.of(0.1)) == "params=0.1"
    assert str(Budget(params=1_000_000, loss=0.05)) == "params=1,000,000, loss=0.05"


# ----------------------------------------------------------------------------- what it refuses


def refusal(*args: Any, **kwargs: Any) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        Budget.of(*args) if args else Budget(**kwargs)
    error = caught.value
    assert error.cause
    assert error.way_out, f"{error} says no way out"
    assert error.way_out in str(error)
    return error


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf, -math.inf, 1.5, 10.0])
def test_a_float_that_is_no_share_is_refused(value: float) -> None:
    assert repr(value) in refusal(value).cause


@pytest.mark.parametrize("value", [0, 1, 1000, -3, True, False, "0.1", None, 1j, {}])
def test_only_a_float_or_a_budget_is_a_budget(value: Any) -> None:
    error = refusal(value)
    assert "a float in (0, 1] or a tensorize.Budget" in error.cause
    assert repr(value) in error.cause


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50%", Budget(params=0.5)),
        (" 29 % ", Budget(params=0.29)),
        ("100%", Budget(params=1.0)),
        ("10MB", Budget(bytes=10_000_000)),
        ("1.5 GiB", Budget(bytes=1536 * 2**20)),
        ("700b", Budget(bytes=700)),
    ],
)
def test_shares_and_sizes_may_be_text(text: str, budget: Budget) -> None:
    assert Budget.of(text) == budget


@pytest.mark.parametrize("text", ["", "0%", "150%", "-5%", "10", "0MB", "MB", "10 apples", "%"])
def test_other_text_is_refused(text: str) -> None:
    refusal(text)


@pytest.mark.parametrize("several", [[0.1], (0.1, 0.5), []])
def test_several_budgets_are_for_a_curve(several: Any) -> None:
    error = refusal(several)
    assert "several budgets" in error.cause
    assert ".curve(" in str(error.way_out)


@pytest.mark.parametrize("name", ["params", "bytes", "flops", "error", "loss"])
@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "0.1", [1], 1j]
)
def test_every_limit_is_a_positive_finite_number(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert name in error.cause
    assert repr(value) in error.cause


@pytest.mark.parametrize("name", ["params", "bytes", "flops"])
def test_a_float_above_one_is_no_share_and_the_int_is_offered(name: str) -> None:
    error = refusal(**{name: 2000.0})
    assert "a float is a share" in error.cause
    assert f"{name}=2000" in str(error.way_out)


def test_a_limit_on_the_loss_or_the_error_may_be_above_one() -> None:
    assert Budget(loss=3.0, error=1.5).loss == 3.0
    assert Budget(loss=2).loss == 2


def test_an_empty_budget_is_refused() -> None:
    assert "at least one limit" in refusal().cause
