"""Alternating least squares in a metric: against optima that are known, and never worse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorize.algebra.decompose import tt_svd
from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric
from tensorize.algebra.reconstruct import reconstruct
from tensorize.algebra.rounding import round_tt
from tensorize.formats.registry import format_of
from tensorize.ir.spec import TTSpec
from tests.marks import slow


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def root(width: int, seed: int) -> Tensor:
    rows = draw(3 * width, width, seed=seed) * torch.logspace(0, -1, width, dtype=torch.float64)
    return torch.linalg.cholesky(rows.T @ rows / len(rows))


def improved(spec: TTSpec, *given: Any) -> tuple[Tensor, ...]:
    return format_of(spec).improved(spec, *given)


def error_of(spec: TTSpec, *given: Any) -> float:
    return format_of(spec).error(spec, *given)


def metric(m: int, n: int, seed: int = 1, scale: float = 0.5) -> Metric:
    return Metric(scale, root(m, seed), root(n, seed + 1))


def test_two_factors_reach_the_whitened_svd() -> None:
    weight, weighed = draw(14, 10), metric(14, 10)
    spec = TTSpec.low_rank(14, 10, 3)
    left, right = best_factors(weight, weighed, 3)
    best = error_of(spec, (left, right), weight, [weighed])
    cores: tuple[Tensor, ...] = (draw(14, 3, seed=5), draw(3, 10, seed=6))
    for _ in range(30):
        cores = improved(spec, cores, weight, [weighed])
    assert error_of(spec, cores, weight, [weighed]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        slow(TTSpec((4, 3), (3, 4), (3,))),
        pytest.param(TTSpec((3, 2, 2), (2, 3, 2), (3, 3)), marks=pytest.mark.slow),
        TTSpec.low_rank(12, 12, 4),
        pytest.param(TTSpec.block((4, 3), (3, 4), 2), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_no_single_core_can_be_better_in_the_end(spec: TTSpec) -> None:
    """Each core against the solution of its normal equations, written out, in float64."""
    weight = draw(*spec.shape)
    metrics = [metric(*spec.shape), metric(*spec.shape, seed=7, scale=2.0)]
    cores = tuple(draw(*shape, seed=k) for k, shape in enumerate(spec.core_shapes))
    for _ in range(200):
        cores = improved(spec, cores, weight, metrics)
    reached = error_of(spec, cores, weight, metrics)
    for k, core in enumerate(cores):
        units = torch.eye(core.numel(), dtype=torch.float64).view(-1, *core.shape)
        images = [reconstruct(spec, [*cores[:k], unit, *cores[k + 1 :]]) for unit in units]
        columns = [
            torch.stack([m.scale**0.5 * m.whiten(i).flatten() for i in images]).T for m in metrics
        ]
        wanted = [m.scale**0.5 * m.whiten(weight).flatten() for m in metrics]
        best = torch.linalg.lstsq(torch.cat(columns), torch.cat(wanted).unsqueeze(1)).solution
        single = [*cores[:k], best.view(core.shape), *cores[k + 1 :]]
        assert reached <= error_of(spec, single, weight, metrics) * (1 + 1e-4)


def test_it_beats_rounding_in_the_metric() -> None:
    weight, weighed = draw(24, 24), metric(24, 24)
    spec, exact = tt_svd(weight, (6, 4), (4, 6))
    for rank in (2, 6, 12):
        rounded, cores = round_tt(spec, list(exact), (rank,))
        before = error_of(rounded, cores, weight, [weighed])
        after = error_of(
            rounded,
            improved(rounded, cores, weight, [weighed]),
            weight,
            [weighed],
        )
        assert after < 0.8 * before


def test_a_tied_weight_is_solved_for_all_its_uses() -> None:
    weight = draw(20, 8)
    metrics = [Metric(1.0, draw(20).abs(), root(8, 3)), Metric(0.5, root(20, 4), None)]
    spec = TTSpec.low_rank(20, 8, 3)
    alone = [best_factors(weight, m, 3) for m in metrics]
    errors = [error_of(spec, cores, weight, metrics) for cores in alone]
    for cores, before in zip(alone, errors, strict=True):
        assert error_of(spec, improved(spec, cores, weight, metrics), weight, metrics) < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_cores_stay_exact(dtype: torch.dtype) -> None:
    spec = TTSpec((4, 3), (3, 4), (2,))
    cores = [draw(*shape, seed=k).to(dtype) for k, shape in enumerate(spec.core_shapes)]
    weight = reconstruct(spec, cores)
    found = improved(spec, cores, weight, [metric(12, 12)])
    assert all(core.dtype == dtype for core in found)
    eps = torch.finfo(dtype).eps
    assert error_of(spec, found, weight, [Metric(1.0, None, None)]) <= (64 * eps) ** 2 * float(
        weight.square().sum()
    )


@pytest.mark.parametrize(("left", "right"), list(itertools.product((None, 1, 2), repeat=2)))
def test_every_kind_of_metric_is_understood(left: int | None, right: int | None) -> None:
    sides = [
        None if kind is None else draw(12, seed=kind).abs() + 0.1 if kind == 1 else root(12, 5)
        for kind in (left, right)
    ]
    weighed, weight = Metric(1.0, *sides), draw(12, 12)
    spec, exact = tt_svd(weight, (4, 3), (3, 4))
    rounded, cores = round_tt(spec, list(exact), (4,))
    before = error_of(rounded, cores, weight, [weighed])
    found = improved(rounded, cores, weight, [weighed])
    assert error_of(rounded, found, weight, [weighed]) <= before
