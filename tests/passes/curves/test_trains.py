"""Tensor trains beside low ranks, and the formats that are analysed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.algebra.reconstruct import reconstruct
from tensorize.base.errors import AnalysisError
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import DENSE, LOW_RANK, TT, TTSpec
from tensorize.passes.curves.formats import UNASKED, formats_by_site
from tensorize.passes.observe.moments import Moments
from tests.passes.curves.losses import (
    BOTH,
    METRICS,
    curve,
    draw,
    lost,
    matches,
    moments_of,
    site,
    with_spectrum,
)

# ------------------------------------------------------------------------------------ tensor trains


def kronecker(terms: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """A 64 x 36 weight that is a sum of Kronecker products of 8 x 6 matrices, and noise."""
    parts = [
        torch.kron(draw((8, 6), seed + 2 * k), draw((8, 6), seed + 2 * k + 1)) for k in range(terms)
    ]
    weight = torch.stack(parts).sum(0)
    return weight + noise * weight.norm() / 48 * draw((64, 36), seed + 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("terms", [1, 3])
def test_kronecker_structure_is_found_without_being_asked_for(
    terms: int, noise: float, dtype: torch.dtype
) -> None:
    weight = kronecker(terms, noise).to(dtype)
    assert curve(weight, Moments(), "frobenius", BOTH).formats == BOTH  # a choice is binding
    found = curve(weight, Moments(), "frobenius", formats=None)
    assert found.formats == (*UNASKED, TT)
    spec, left = next((s, lost) for s, lost in found.train_points if s.ranks[0] >= terms)
    low = float(found.distortion[spec.parameters // (64 + 36)])
    assert left < 0.5 * low
    if not noise:
        assert left <= 1e3 * torch.finfo(dtype).eps ** 2 * float(found.distortion[0])


def test_no_structure_is_found_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 36), (36, 64), (64, 64), (96, 24), (30, 49), (37, 64), (53, 59)):
        m, n = shape
        gaussian = torch.randn(shape, generator=generator)
        low_rank = gaussian[:, :5] @ torch.randn(5, n, generator=generator)
        decaying = with_spectrum(
            max(shape), min(shape), torch.logspace(0, -2, min(shape)).double()
        ).float()
        decaying = decaying if m >= n else decaying.mT
        for name, weight in {
            "gaussian": gaussian,
            "low rank": low_rank,
            "low rank and noise": low_rank + 0.1 * gaussian,
            "decaying": decaying,
            "zero": torch.zeros(shape),
        }.items():
            found = curve(weight, Moments(), "frobenius", formats=None)
            assert found.formats == UNASKED, f"{name} {shape}"
            assert found.trains == ()
            assert found.train_points == ()


def test_the_probe_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    curve(kronecker(1), Moments(), "frobenius", formats=None)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("formats", [(DENSE, TT), (TT,), (DENSE, LOW_RANK, TT)])
@pytest.mark.parametrize("metric", METRICS)
def test_tensor_trains_asked_for_are_evaluated_in_the_metric(
    metric: str, formats: tuple[str, ...]
) -> None:
    weight, moments = draw((24, 36)), moments_of(24, 36, metric)
    found = curve(weight, moments, metric, formats)
    assert found.formats == formats
    assert {len(train.spec.cores) for train in found.trains} == {2, 3}
    assert found.train_points
    whole = lost(weight, moments, metric)
    for spec, left in found.train_points:
        assert spec.format == TT
        assert spec.parameters - spec.removable < 24 * 36
        delta = weight - reconstruct(spec, found.factors(spec, weight))
        assert matches(left, lost(delta, moments, metric), whole)
        assert found.distortion_of(spec) == left


def test_a_train_between_the_points_is_evaluated_when_asked_for() -> None:
    weight, moments = draw((24, 36)), moments_of(24, 36, "loss")
    found = curve(weight, moments, "loss", (DENSE, TT))
    exact = found.trains[0].spec
    known = {spec.ranks for spec, _ in found.train_points}
    rank = next(r for r in range(1, 99) if (r,) not in known)
    spec = exact.with_ranks((rank,))
    delta = weight - reconstruct(spec, found.factors(spec, weight))
    whole = lost(weight, moments, "loss")
    assert matches(found.distortion_of(spec), lost(delta, moments, "loss"), whole)
    full = found.distortion_of(exact)
    assert full <= (1e3 * torch.finfo(torch.float64).eps) ** 2 * whole


def test_what_cannot_be_split_has_no_trains() -> None:
    prime = curve(draw((7, 11)), Moments(), "frobenius", (DENSE, TT))
    assert prime.train_points == ()
    experts = curve(draw((3, 8, 6)), Moments(), "frobenius", (DENSE, TT))
    assert experts.train_points == ()


def test_a_train_of_other_modes_is_an_error_with_a_way_out() -> None:
    found = curve(draw((24, 36)), Moments(), "frobenius", (DENSE, TT))
    with pytest.raises(AnalysisError, match=r"layer\.weight.*no tensor train with the modes"):
        found.distortion_of(TTSpec((2, 12), (6, 6), (3,)))


def test_formats_that_were_not_analysed_are_refused() -> None:
    found = curve(draw((8, 6)), Moments(), "frobenius")
    found.require((DENSE, LOW_RANK))
    with pytest.raises(AnalysisError, match="'tt' was not analysed") as caught:
        found.require((TT,))
    assert "formats=" in str(caught.value)


# -------------------------------------------------------------------------------------- the formats


def test_formats_are_a_name_several_names_or_a_pattern_to_names() -> None:
    one = site(8, 6)
    two = Site("head.weight", (8, 6), "float32", (Use("linear", "columns"),))
    sites = [one, two]
    default = (*BOTH, "shared")
    assert formats_by_site(sites, None) == {"layer.weight": default, "head.weight": default}
    assert formats_by_site(sites, "tt") == {"layer.weight": (TT,), "head.weight": (TT,)}
    assert formats_by_site(sites, ["dense", "tt"])["head.weight"] == (DENSE, TT)
    chosen = formats_by_site(sites, {"head": "tt", "*": ("dense", "low_rank", "tt")})
    assert chosen == {"layer.weight": (DENSE, LOW_RANK, TT), "head.weight": (TT,)}
    assert formats_by_site(sites, {"head": "tt"})["layer.weight"] == default


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(AnalysisError, match="'butterfly' is no format") as caught:
        formats_by_site([site(8, 6)], ["dense", "butterfly"])
    assert "low_rank" in str(caught.value)
    with pytest.raises(AnalysisError, match="formats='nothing' matches no weight"):
        formats_by_site([site(8, 6)], {"nothing": "tt"})


def test_a_metric_is_the_norm_that_it_says() -> None:
    weight = draw((8, 6))
    left, right = draw((8, 8), 1).tril(), draw((6,), 2).abs()
    metric = Metric(0.5, left.float(), right.float())
    white = left.float().double().mT @ weight * right.float().double()
    assert metric.norm(weight) == pytest.approx(0.5 * float(white.square().sum()))
    torch.testing.assert_close(metric.whiten(weight), white)
    torch.testing.assert_close(metric.gram(weight), white.mT @ white)
