"""What inputs of quantized weights are rounded to, and what a plan says of the time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.precision import FLOAT, INPUTS, INTEGERS, ONE_DIGIT, TWO_DIGITS
from tensorize.ir.sites import Use
from tensorize.passes.allocate.candidates import curve_points
from tensorize.passes.allocate.inputs import Inputs
from tensorize.passes.allocate.slower import slow_choices
from tests.passes.allocate.programs import falling, linear, program
from tests.passes.allocate.test_families import ALL, planned, rounded

LARGE = linear("w", 768, 768)
BATCHES = (1, 16, 256)
HALF = replace(LARGE, dtype="bfloat16")


def points(inputs: Inputs, site=LARGE, machine: Machine = GENERIC):  # type: ignore[no-untyped-def]
    """What inputs are rounded to of a weight's points, by precision and rank (0: dense)."""
    found = curve_points(
        rounded(falling(site)),
        *(("dense", "low_rank"), 4, BATCHES),
        machine=machine,
        precisions=ALL,
        inputs=inputs,
    )
    specs = ((found.spec(k), k) for k in range(len(found.labels)))
    return {(s.precision, sum(s.ranks)): (s.inputs, k) for s, k in specs if _coded(s)}, found


def _coded(spec: object) -> bool:
    return isinstance(spec, QuantizedSpec)


def test_two_digits_where_one_costs_more_than_the_weights_and_two_are_fast() -> None:
    chosen, found = points(Inputs())
    one, _ = points(Inputs(ONE_DIGIT))
    assert {kind for kind, _ in one.values()} == {ONE_DIGIT}
    assert chosen["int8", 0][0] == TWO_DIGITS
    assert chosen["int2", 0][0] == ONE_DIGIT
    lost = {name: found.distortion[k] for name, (_, k) in chosen.items()}
    # In bfloat16 dense is as fast as integers: twice as many are slower.
    assert points(Inputs(), HALF)[0]["int8", 0][0] == ONE_DIGIT
    less = points(Inputs(TWO_DIGITS), HALF)
    assert less[1].distortion[less[0]["int8", 0][1]] == pytest.approx(lost["int8", 0])


@pytest.mark.parametrize("asked", INPUTS)
def test_what_was_asked_for_holds_for_all(asked: str) -> None:
    assert {kind for kind, _ in points(Inputs(asked))[0].values()} == {asked}


def test_without_packs_fewer_than_eight_bits_are_numbers() -> None:
    chosen, _ = points(Inputs(packs=False))
    for (precision, _), (kind, _) in chosen.items():
        assert (kind == FLOAT) == (INTEGERS[precision].bits < 8)
    rows = replace(LARGE, uses=(Use("matmul", "rows"),))
    assert {kind for kind, _ in points(Inputs(packs=False), rows)[0].values()} == {FLOAT}
    assert FLOAT not in {kind for kind, _ in points(Inputs(), rows)[0].values()}


def test_what_no_rows_meet_and_what_a_gpu_runs_rounds_no_inputs() -> None:
    for use in (Use("conv2d", "columns"), Use("linear", "columns", partial=True)):
        other = replace(LARGE, uses=(use,))
        assert {kind for kind, _ in points(Inputs(), other)[0].values()} == {FLOAT}
    gpu = points(Inputs(), machine=replace(GENERIC, rank_multiple=8))[0]
    assert gpu["int4", 0][0] == FLOAT


def test_bytes_are_what_memory_holds_and_stored_is_what_a_file_does() -> None:
    analysed = program([rounded(falling(linear(f"w{k}", 512, 512), 2 + k)) for k in range(3)])
    for budget, packed in ((Budget(stored=0.15), True), (Budget(bytes=0.15), False)):
        found = planned(analysed, budget, formats=dict.fromkeys(analysed.spectra, ("dense",)))
        specs = [choice.spec for choice in found.sites if choice.spec is not None]
        assert found.predicted.bytes <= 0.15 * found.dense.bytes
        assert any(spec.packed_bytes({"columns"}) > 0 for spec in specs) == packed
        slow = slow_choices(analysed.sites, found.sites, found.batch_sizes, analysed.machine)
        assert bool(slow) != packed
        assert all(("slower than dense at" in c.reason) == (c.name in slow) for c in found.sites)


def test_a_plan_stays_wider_where_that_is_faster_and_costs_nothing() -> None:
    analysed = program([rounded(falling(linear("w", 512, 512), 2))])
    found = planned(analysed, Budget(bytes=0.4), formats={"w": ("dense",)})
    assert found.sites[0].precision == "int8"
    assert not slow_choices(analysed.sites, found.sites, found.batch_sizes, analysed.machine)


def test_both_limits_are_one_too_many() -> None:
    with pytest.raises(BudgetError, match="limit the same"):
        Budget(bytes=0.2, stored=0.2)
    assert str(Budget(stored=0.2)) == "stored=0.2"
