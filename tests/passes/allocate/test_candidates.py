"""Ranks by hand, and the formats that are allowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tensorize.base.errors import AnalysisError
from tensorize.ir.spec import DENSE, LOW_RANK, TT, TTSpec
from tests.passes.allocate.programs import (
    BOTH,
    M,
    N,
    curve,
    falling,
    linear,
    model_of,
    plan,
    program,
    trained,
)

# ------------------------------------------------------------------------------------ ranks by hand


def test_ranks_override_the_allocation_and_the_rest_is_allocated() -> None:
    made = model_of()
    found = plan(made, 0.4, ranks={"w2": 5})
    chosen = {site.name: site for site in found.sites}
    assert chosen["w2"].ranks == (5,)
    assert chosen["w2"].reason == "ranks=5"
    assert 0.98 * 0.4 <= found.predicted.parameters / found.dense.parameters <= 0.4
    tails = made.spectra["w2"].distortion
    assert chosen["w2"].predicted_loss == float(tails[5])
    assert chosen["w2"].predicted_error == pytest.approx(float((tails[5] / tails[0]).sqrt()))


def test_without_a_budget_the_rest_stays_dense() -> None:
    found = plan(model_of(), None, ranks={"w[01]": 5})
    assert [site.format for site in found.sites] == [LOW_RANK] * 2 + [DENSE] * 4
    assert found.budget == "none"
    assert found.sites[2].reason == "not named by ranks="


def test_full_is_exact_and_large_ranks_are_cut() -> None:
    for rank in ("full", N, 1000):
        (site, *_) = plan(model_of(), None, ranks={"w0": rank}).sites
        assert site.spec == TTSpec.low_rank(M, N, N)
        assert (site.predicted_error, site.predicted_loss) == (0.0, 0.0)


def test_a_name_goes_before_a_pattern_and_the_first_pattern_before_others() -> None:
    found = plan(model_of(), None, ranks={"w0": 7, "w[0-2]": 6, "*": 5})
    assert [site.ranks[0] for site in found.sites] == [7, 6, 6, 5, 5, 5]


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "half", None])
def test_what_is_no_rank_is_refused(rank: Any) -> None:
    with pytest.raises(AnalysisError, match=r"ranks\['w0'\] must be a positive integer or 'full'"):
        plan(model_of(), None, ranks={"w0": rank})


def test_a_pattern_that_names_nothing_is_refused_with_near_names() -> None:
    with pytest.raises(AnalysisError, match="ranks='w9' matches no weight") as caught:
        plan(model_of(), None, ranks={"w9": 3})
    assert "near names: w" in str(caught.value)


def test_a_rank_for_a_blocked_weight_is_refused_but_not_by_a_pattern() -> None:
    blocked = replace(linear("router"), blocked="excluded by the caller")
    made = program([falling(linear("w"))], [blocked])
    with pytest.raises(AnalysisError, match=r"^router: .*excluded by the caller"):
        plan(made, None, ranks={"router": 3})
    found = plan(made, None, ranks={"*": 3})
    assert [site.format for site in found.sites] == [LOW_RANK, DENSE]
    assert found.sites[1].reason == "excluded by the caller"


# -------------------------------------------------------------------------------------- the formats


def test_structure_that_was_found_is_used() -> None:
    found = {site.name: site for site in plan(trained(None), 0.3).sites}
    assert found["kronecker"].format == TT
    assert found["kronecker"].predicted_error < 1e-5
    assert found["noise"].format in BOTH


@pytest.mark.parametrize("allowed", [(LOW_RANK,), (TT,), (DENSE, TT), (DENSE,)])
def test_only_the_formats_that_are_allowed_are_used(allowed: tuple[str, ...]) -> None:
    made = trained((DENSE, LOW_RANK, TT))
    options = {"formats": dict.fromkeys(("kronecker", "noise"), allowed)}
    found = plan(made, 1.0, **options)
    assert {site.format for site in found.sites} <= set(allowed)
    if DENSE not in allowed:
        # No exact point is allowed, and the budget is spent as far as the points go.
        assert found.predicted.parameters > 0.5 * found.dense.parameters or TT in allowed


def test_ranks_of_trains() -> None:
    made = trained((TT,))
    for rank, expected in ((3, 3), ("full", made.spectra["noise"].trains[0].spec.ranks[0])):
        found = plan(made, None, ranks={"*": rank})
        assert [site.format for site in found.sites] == [TT, TT]
        assert found.sites[1].ranks[0] == expected
        curve_of = made.spectra["noise"]
        lost_there = curve_of.distortion_of(found.sites[1].spec)
        assert found.sites[1].predicted_error == pytest.approx(curve_of.error(lost_there))


def test_a_weight_too_small_for_any_rank_says_so() -> None:
    made = program([falling(linear("w")), curve(linear("thin", 1, N), [1.0])])
    site = plan(made, 0.6).sites[1]
    assert site.format == DENSE
    assert site.reason == "no rank of low_rank saves parameters"
