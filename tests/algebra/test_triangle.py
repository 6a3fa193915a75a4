"""Hermitian and triangular matrices, held as one triangle."""

import pytest
import torch

from tensorize.algebra.metric import Metric
from tensorize.algebra.triangle import (
    Triangle,
    add_products,
    entries,
    hermitian,
    packed,
    triangular,
)

WIDTHS = (2, 3, 64, 65, 131, 200)
DTYPES = (torch.float32, torch.float64, torch.complex64)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_both_kinds_of_matrices_come_back_as_they_were(width: int, dtype: torch.dtype) -> None:
    rows = draw(2 * width, width, dtype=dtype)
    moment = rows.mT @ rows.conj()
    moment = moment.tril(-1) + moment.tril(-1).mH + moment.diagonal().real.to(dtype).diag()
    assert torch.equal(Triangle(moment).symmetric(), moment)
    assert torch.equal(Triangle(moment).lower(), moment.tril())
    factor = torch.linalg.cholesky(moment)
    assert torch.equal(Triangle(factor).lower(), factor)
    assert torch.equal(Triangle(moment).diagonal(), moment.diagonal())


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_the_matrices(width: int) -> None:
    first, second = (draw(width, width, seed=k) for k in (1, 2))
    first, second = first + first.mT, second + second.mT
    total = Triangle(first).add_(second).div_(3.0)
    assert torch.equal(total.symmetric(), (first + second) / 3)
    assert torch.equal(first, Triangle(first).symmetric()), "what is held is its own"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_products_are_added_in_place(width: int, dtype: torch.dtype) -> None:
    one, other = (draw(40, width, dtype=dtype, seed=k) for k in (1, 2))
    held = packed(torch.zeros(width, width, dtype=dtype))
    add_products(held, one)
    add_products(held, other.conj())
    wide = torch.complex128 if dtype.is_complex else torch.float64
    one, other = one.to(wide), other.conj().to(wide)
    exact = one.mT @ one.conj() + other.mT @ other.conj()
    tolerance = {"rtol": 0.0, "atol": 80 * torch.finfo(dtype).eps * float(exact.abs().max())}
    torch.testing.assert_close(hermitian(held).to(wide), exact, **tolerance)


@pytest.mark.parametrize("width", [1, 64, 65, 576])
def test_what_is_held_is_half_of_the_matrix(width: int) -> None:
    held = packed(draw(width, width))
    most = width**2 if width <= 64 else width * (width + 50) / 2
    assert held.nbytes == 8 * entries(width) <= 8 * most


def test_small_ones_and_diagonals_and_stacks_stay_tensors() -> None:
    for tensor in (draw(5, 5), draw(64), draw(3, 128, 128)):
        assert packed(tensor) is tensor
        assert hermitian(tensor) is triangular(tensor) is tensor


def test_a_metric_is_the_same_when_it_is_packed() -> None:
    roots = [
        torch.linalg.cholesky(m @ m.mT).contiguous() for m in (draw(80, 80), draw(70, 70, seed=1))
    ]
    metric, weight = Metric(0.5, *roots), draw(80, 70, seed=2)
    held = metric.packed()
    assert isinstance(held.held_left, Triangle)
    assert isinstance(held.held_right, Triangle)
    assert held.norm(weight) == metric.norm(weight)
    assert torch.equal(held.transposed().gram(weight.mT), metric.transposed().gram(weight.mT))
    assert held.mixes_rows
    assert not held.plain
    assert not held.apart
