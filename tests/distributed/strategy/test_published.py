"""The planner beside what was published: BOOST's table, and Frontier's choices."""

from __future__ import annotations

import pytest

from benchmarks.strategy import (
    FITTED,
    ON,
    STYLES,
    boost_errors,
    boost_estimate,
    fitted,
    frontier_choice,
    published,
)
from tensorize.distributed import CLUSTERS, Workload
from tensorize.distributed.strategy.memory import states_table
from tensorize.distributed.strategy.volumes import elements, forward_messages

ROWS = {row["model"]: row for row in published("boost")["rows"]}


def test_constants_are_those_that_meet_the_rows_of_7b_alone() -> None:
    cluster = CLUSTERS[ON]
    found = fitted(cluster)
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(cluster, name), rel=0.02)
    assert all(abs(off) < 0.01 for off in boost_errors(cluster, ["7B"])["7B"].values())


@pytest.mark.parametrize("model", ["3B", "13B"])
def test_other_models_are_predicted_within_15_percent(model: str) -> None:
    errors = boost_errors(CLUSTERS[ON], [model])[model]
    assert all(abs(off) < 0.15 for off in errors.values()), errors


@pytest.mark.parametrize("model", list(ROWS))
def test_the_order_of_the_three_ways_is_right(model: str) -> None:
    row = ROWS[model]
    found = {kind: boost_estimate(row, kind, CLUSTERS[ON]).total for kind in STYLES}
    assert sorted(found, key=found.__getitem__) == sorted(
        row["seconds"], key=row["seconds"].__getitem__
    )


@pytest.mark.parametrize("kind", list(STYLES))
def test_what_a_layer_sends_is_what_was_published(kind: str) -> None:
    table = published("boost")
    shape = table["shapes"]["7B"]
    rank = None if kind == "full" else shape["width"] // 4
    layer = Workload.decoder(**shape, rank=rank).layers[0]
    rows = table["batch"] * table["sequence"]
    sent = 2 * rows * elements(forward_messages(layer, STYLES[kind])) / 2**30
    assert sent == pytest.approx(table["sent"]["gb"][kind], rel=0.03)


@pytest.mark.parametrize(("model", "total"), [("175B", 3.5e12), ("1T", 20e12)], ids=["175B", "1T"])
def test_states_follow_the_rule_of_20_bytes(model: str, total: float) -> None:
    workload = Workload.decoder(**published("frontier")["shapes"][model], gated=False)
    assert sum(states_table(workload).values()) == pytest.approx(total, rel=0.03)


GAPS = {
    "175B": {"of the same kind": 0.271, "of all": 0.469},
    "1T": {"of the same kind": 0.139, "of all": 0.139},
}


@pytest.mark.parametrize("row", published("frontier")["rows"], ids=lambda row: row["model"])
def test_what_was_chosen_on_frontier_fits_and_is_as_far_behind_as_is_told(row: dict) -> None:
    """Nothing was fitted to it: docs/strategy.md tells these gaps."""
    choice = frontier_choice(row)
    print(row["model"], choice.gaps)
    assert choice.theirs.fits
    assert choice.gaps == pytest.approx(GAPS[row["model"]], abs=0.02)
