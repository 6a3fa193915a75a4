"""Decompositions of difficult weights, and structure that is found in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorize.algebra.factors import gram_eigenvectors, singular_squares
from tensorize.algebra.reconstruct import reconstruct
from tensorize.base.errors import AnalysisError
from tensorize.ir.spec import TTSpec
from tensorize.passes.observe.moments import Moments
from tests.passes.curves.losses import (
    METRICS,
    curve,
    draw,
    lost,
    moments_of,
    paying,
    whitened,
    with_spectrum,
)


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [1, 3, 6, 9, 12])
def test_truncated_errors_are_those_of_an_svd_to_four_digits(
    decades: int, dtype: torch.dtype, turned: bool
) -> None:
    """Spectra that fall geometrically, as far below a Gram matrix's precision as 1e-12."""
    m, n, pay = 48, 32, 19
    values = torch.logspace(0, -decades, n, dtype=torch.float64)
    weight = with_spectrum(m, n, values).to(dtype)
    weight = weight.mT.contiguous() if turned else weight
    vectors, squares = gram_eigenvectors(weight, pay)
    exact = torch.linalg.svdvals(weight.double()).square()
    assert torch.equal(squares, squares.sort(descending=True).values)
    for rank in range(pay + 1):
        tail = exact[rank:].sum()
        assert float(squares[rank:].sum()) == pytest.approx(float(tail), rel=1e-4)
        basis = vectors[:, :rank].double()
        w = weight.double()
        rest = w - (basis @ (basis.mT @ w) if turned else w @ basis @ basis.mT)
        # A projection in float64 has rounding of its own.
        floor = (64 * torch.finfo(torch.float64).eps) ** 2 * float(exact.sum())
        assert float(rest.square().sum()) == pytest.approx(float(tail), rel=1e-4, abs=floor)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("decades", [3, 9])
def test_curves_of_ill_conditioned_weights_are_right(decades: int, metric: str) -> None:
    weight = with_spectrum(48, 32, torch.logspace(0, -decades, 32, dtype=torch.float64))
    moments = moments_of(48, 32, metric)
    found = curve(weight, moments, metric)
    squares = torch.linalg.svdvals(whitened(weight, moments, metric)).square()
    for rank in range(paying(48, 32) + 1):
        expected = float(squares[rank:].sum())
        assert float(found.distortion[rank]) == pytest.approx(expected, rel=1e-4)
        spec = TTSpec.low_rank(48, 32, max(rank, 1))
        if rank:
            delta = weight - reconstruct(spec, found.factors(spec, weight))
            assert lost(delta, moments, metric) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_a_weight_of_lower_rank_loses_nothing_from_there_on(
    shape: tuple[int, int], dtype: torch.dtype, metric: str
) -> None:
    weight = (draw((shape[0], 5)) @ draw((5, shape[1]), 1)).to(dtype)
    moments = moments_of(*shape, metric)
    found = curve(weight, moments, metric)
    whole = float(found.distortion[0])
    floor = (64 * torch.finfo(dtype).eps) ** 2 * whole
    assert float(found.distortion[4]) > 1e-6 * whole
    assert float(found.distortion[5]) <= floor
    spec = TTSpec.low_rank(*shape, 5)
    rebuilt = reconstruct(spec, [core.double() for core in found.factors(spec, weight)])
    assert lost(weight.double() - rebuilt, moments, metric) <= 100 * floor
    full = found.factors(TTSpec.low_rank(*shape, paying(*shape)), weight)
    assert all(torch.isfinite(core).all() for core in full)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (3, 8, 6)])
def test_a_weight_of_zeros_loses_nothing(shape: tuple[int, ...], metric: str) -> None:
    weight, (m, n) = torch.zeros(shape), shape[-2:]
    found = curve(weight, moments_of(m, n, metric), metric)
    assert (found.distortion == 0).all()
    assert found.error(0.0) == 0.0
    assert found.measured_error(weight, weight.clone()) == 0.0
    spec = TTSpec.low_rank(m, n, 2, experts=shape[0] if len(shape) == 3 else 0)
    assert (reconstruct(spec, found.factors(spec, weight)) == 0).all()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_weights_whose_squares_leave_float32_are_done_in_float64(scale: float) -> None:
    weight = (draw((12, 9)) * scale).float()
    found = curve(weight, Moments(), "frobenius")
    squares = torch.linalg.svdvals(weight.double()).square()
    for rank in range(10):
        expected = float(squares[rank:].sum())
        assert float(found.distortion[rank]) == pytest.approx(expected, rel=1e-4)
    left, right = found.factors(TTSpec.low_rank(12, 9, 5), weight)
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("always", [False, True], ids=["in float32", "always"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigensolver_that_fails_is_not_the_end(
    dtype: torch.dtype, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw((12, 9))
    exact = torch.linalg.svdvals(weight).square()

    def failing(solver: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def fails(matrix: Tensor) -> Any:
            if matrix.dtype == torch.float32 or always:
                raise torch.linalg.LinAlgError("failed to converge")
            return solver(matrix)

        return fails

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, failing(getattr(torch.linalg, name)))
    _, squares = gram_eigenvectors(weight.to(dtype), 5)
    for found in (squares, singular_squares(weight.to(dtype), 5)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_moments_that_are_not_finite_are_an_error_that_names_the_site(
    bad: float, diagonal: bool
) -> None:
    moments = moments_of(8, 6, "loss", diagonal=diagonal)
    columns = moments.terms["columns"].columns
    assert columns is not None
    columns[0] = bad
    with pytest.raises(AnalysisError, match=r"^layer\.weight: .*second moment") as caught:
        curve(draw((8, 6)), moments, "loss")
    assert "calibration data" in str(caught.value)


def test_a_metric_of_zeros_is_no_reason_to_fail() -> None:
    """Inputs that are always zero: the weight does not matter."""
    moments = moments_of(8, 6, "loss")
    moments.terms["columns"].held["columns"] = torch.zeros(6, 6, dtype=torch.float64)
    weight = draw((8, 6))
    found = curve(weight, moments, "loss")
    assert torch.isfinite(found.distortion).all()
    left, right = found.factors(TTSpec.low_rank(8, 6, 3), weight)
    assert torch.isfinite(left @ right).all()
    assert float(found.distortion[0]) < 1e-12
