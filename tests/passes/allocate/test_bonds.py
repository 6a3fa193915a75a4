"""Trains and blocks that store no identity, as points beside those that store all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import tensorize
from tensorize.algebra.metric import Metric
from tensorize.ir.machine import GENERIC
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate.candidates import COSTS, Points, curve_points, forced_point
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.spectra import spectrum
from tensorize.weight.install import factored
from tests.models import parameters, relative

FORMATS = ("dense", "tt", "block")


@cache
def curve(dtype: str = "float32") -> Spectrum:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    site = Site("w", (64, 48), dtype, (Use("linear", "columns"),))
    return spectrum(site, weight, (Metric(1.0, None, None),), ("tt", "block"))


def points(**how: object) -> Points:
    return curve_points(curve(), FORMATS, 4, (1, 64), pivots=True, **how)  # type: ignore[arg-type]


def at(found: Points) -> dict[TTSpec, int]:
    specs = ((found.spec(k), k) for k in range(len(found.labels)))
    return {spec: k for spec, k in specs if isinstance(spec, TTSpec)}


def test_every_structure_has_both_forms_and_the_bare_one_loses_no_more() -> None:
    found = points()
    known = at(found)
    pairs = [
        (k, known[spec.plain]) for spec, k in known.items() if spec.pivoted and spec.plain in known
    ]
    assert {spec.format for spec in known if spec.pivoted} == {"tt", "block"}
    assert len(pairs) > 4
    for bare, plain in pairs:
        spec = found.spec(bare)
        assert isinstance(spec, TTSpec)
        a, b = found.costs[bare], found.costs[plain]
        indices = sum(index.bytes for index in spec.indices)
        assert a[0] == spec.parameters == b[0] - spec.plain.removable
        assert a[1] == b[1] - 4 * spec.plain.removable + indices < b[1]
        assert a[2] == b[2]  # what is put back is multiplied as before
        assert (a[len(COSTS) :] > b[len(COSTS) :]).all()  # and takes a pass over the cores
        assert found.distortion[bare] == pytest.approx(found.distortion[plain], rel=1e-6)


def test_ranks_pay_that_did_not_as_long_as_something_is_saved() -> None:
    more = [spec for spec in at(points()) if spec.plain.parameters >= 64 * 48]
    assert more
    assert all(spec.pivoted and spec.parameters < 64 * 48 for spec in more)


def test_tiny_ranks_store_all_and_so_does_what_reads_no_orders() -> None:
    assert not any(spec.pivoted for spec in at(points()) if max(spec.ranks) == 1)
    plain = curve_points(curve(), FORMATS, 4, (1, 64))
    assert not any(spec.pivoted for spec in at(plain))
    assert all(spec.parameters < 64 * 48 for spec in at(plain))


def test_where_putting_them_back_makes_it_slower_than_dense_it_is_no_point() -> None:
    site = Site("w", (2048, 2048), "float32", (Use("linear", "columns"),))
    spec = TTSpec.block((128, 16), (16, 128), 8)
    lost = torch.tensor([4.0], dtype=torch.float64)
    large = Spectrum(site, ("block",), (), lost, train_points=((spec, 1.0),))
    for rate, forms in ((1e-12, {0, 1}), (1e-6, {0})):
        machine = replace(GENERIC, by_index=rate)
        found = curve_points(large, ("block",), 4, (256,), machine=machine, pivots=True)
        assert {each.pivoted for each in at(found)} == forms


def test_half_precision_counts_what_rounding_costs() -> None:
    found = curve_points(curve("bfloat16"), ("tt",), 2, (1,), pivots=True)
    known = at(found)
    pairs = [
        (k, known[spec.plain]) for spec, k in known.items() if spec.pivoted and spec.plain in known
    ]
    assert pairs
    assert all(found.distortion[bare] > found.distortion[plain] for bare, plain in pairs)


def test_a_rank_that_is_asked_for_is_bare_where_that_pays() -> None:
    for rank, pivoted in ((12, 1), (1, 0)):
        point = forced_point(curve(), rank, 4, (1,), ("block",), pivots=True)
        assert point.others[0].pivoted == pivoted


@pytest.mark.parametrize("form", ["block", pytest.param("tt", marks=pytest.mark.slow)])
def test_compile_makes_it_and_it_is_what_was_planned(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48)).eval()
    data = list(torch.randn(6, 16, 48))
    small = tensorize.compile(model, 0.6, calibration=data, formats=form, refine=None)
    found = tensorize.report(small)
    assert any(weight.spec.pivoted for _, weight in factored(small))
    assert parameters(small) == found.plan.predicted.parameters
    assert found.totals.after.bytes == found.plan.predicted.bytes
    with torch.no_grad():
        assert relative(small(data[0]), tensorize.densify(small)(data[0])) < 1e-5
    again = tensorize.Plan.from_json(found.plan.to_json())
    assert again.sites == found.plan.sites
