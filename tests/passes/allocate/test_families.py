"""Families of forms: what a distortion of each counts; and the least bytes for a damage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tensorize.base.errors import BudgetError
from tensorize.formats.dense import is_dense
from tensorize.ir.budget import Budget
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.machine import GENERIC
from tensorize.ir.plan import Plan, RankPlan
from tensorize.ir.sites import Use
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.candidates import curve_points
from tensorize.passes.allocate.forms import BITS, BOTH
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.rounding import Rounding
from tensorize.passes.predict.predictor import Predictor
from tensorize.passes.stages import Analysed
from tests.passes.allocate.programs import BOTH as FORMATS
from tests.passes.allocate.programs import falling, linear, program

ALL = ("int8", "int4", "int2")


def rounded(curve: Spectrum) -> Spectrum:
    """A curve that says what bits lose as well."""
    whole, count = float(curve.distortion[0]), len(curve.distortion)
    sums = torch.linspace(0, 1, count, dtype=torch.float64)
    lost = {"int8": 1e-5, "int4": 4e-3, "int2": 0.2}
    found = tuple(Rounding(name, whole * lost[name], whole * lost[name] * sums) for name in ALL)
    return replace(curve, roundings=found)


def made(**worth: float) -> Analysed:
    curves = [rounded(falling(linear(f"w{k}", 64, 48), 3 + k, 1 + k % 3)) for k in range(4)]
    names = {"bits": BITS, "both": BOTH}
    counts = {names[name]: value for name, value in worth.items()}
    return program(curves, predictor=Predictor((), "nats", held_out=True, worth=counts))


def family(choice: RankPlan) -> str:
    if choice.spec is None or choice.spec.precision is None:
        return "ranks"
    return BITS if is_dense(choice.spec.format) else BOTH


def planned(analysed: Analysed, budget: Budget, **options: object) -> Plan:
    options = {"precision": "auto", **options}
    return Allocate(budget, **options).run(analysed).plan  # type: ignore[arg-type]


def test_the_distortion_of_a_point_counts_as_that_of_its_family() -> None:
    curve = rounded(falling(linear("w", 64, 48)))
    given = curve, FORMATS, 4, (1,)
    plain = curve_points(*given, precisions=ALL)
    found = curve_points(*given, precisions=ALL, worth={BITS: 0.5, BOTH: 2.0})
    assert (found.labels == plain.labels).all()
    counts = {"ranks": 1.0, BITS: 0.5, BOTH: 2.0}
    seen = set()
    for k in range(len(found.labels)):
        (one,) = found.plans(k)
        assert found.distortion[k] == pytest.approx(counts[family(one)] * plain.distortion[k])
        assert found.objective[k] == found.distortion[k] == one.predicted_loss
        assert found.errors[k] == plain.errors[k]
        seen.add(family(one))
    assert seen == set(counts)


def test_a_family_that_counts_for_more_is_chosen_less() -> None:
    budget = Budget(bytes=0.12)
    bits = [sum(family(c) == BITS for c in planned(a, budget).sites) for a in (
        made(bits=0.2, both=5.0), made(bits=5.0, both=0.2)
    )]  # fmt: skip
    assert bits[0] > bits[1]


def test_only_weights_that_are_read_as_integers_round_their_inputs() -> None:
    site = linear("w", 64, 48)
    table = replace(site, uses=(Use("embedding", "lookup"),))
    gpu = replace(GENERIC, rank_multiple=8)
    lost = {}
    for name, each, machine in (
        ("linear", site, GENERIC), ("table", table, GENERIC), ("gpu", site, gpu),
    ):  # fmt: skip
        points = curve_points(
            rounded(falling(each)), ("dense",), 4, (1,), machine=machine, precisions=ALL
        )
        for k in range(len(points.labels)):
            spec = points.spec(k)
            if isinstance(spec, QuantizedSpec):
                lost[name, spec.precision] = float(points.distortion[k])
    assert lost["table", "int8"] == lost["gpu", "int8"] < lost["linear", "int8"]
    assert lost["table", "int4"] == lost["gpu", "int4"] < lost["linear", "int4"]


@pytest.mark.parametrize("limit", [Budget(loss=0.05), Budget(loss=0.5), Budget(error=0.1)])
def test_a_limit_on_the_damage_alone_takes_the_fewest_bytes(limit: Budget) -> None:
    analysed = made(bits=0.7, both=0.8)
    found = planned(analysed, limit)
    lost = sum(site.predicted_loss for site in found.sites)
    if limit.loss is not None:
        assert lost <= limit.loss
    else:
        assert limit.error is not None
        assert max(site.predicted_error for site in found.sites) <= limit.error
    smaller = replace(limit, bytes=int(0.95 * found.predicted.bytes))
    with pytest.raises(BudgetError):
        planned(analysed, smaller)
    alone = planned(analysed, limit, precision=None)
    assert found.predicted.bytes < alone.predicted.bytes


def test_dense_weights_alone_take_bits() -> None:
    analysed = made()
    formats = dict.fromkeys(analysed.spectra, ("dense",))
    found = planned(analysed, Budget(bytes=0.2), formats=formats, precision=ALL)
    assert {family(choice) for choice in found.sites} == {BITS}
    assert np.isfinite(found.predicted.bytes)
