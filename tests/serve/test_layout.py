"""A merged layer in few products is its weights beside each other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensorize.serve.layout import Layout, laid_out
from tensorize.serve.matrices import Matrix, Weight

N = 8


def matrix(rows: int, columns: int, *, coded: bool = False) -> Matrix:
    if not coded:
        return Matrix(torch.randn(rows, columns, dtype=torch.float64))
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return Matrix(codes, torch.rand(rows, 1, dtype=torch.float64) / 127)


def values(found: Matrix) -> Tensor:
    return found.entries if found.scale is None else found.entries * found.scale


def multiplied(layout: Layout, x: Tensor) -> Tensor:
    across = [x @ values(product).t() for product in layout.products]
    outputs = []
    for piece in layout.pieces:
        found = across[piece.product][:, piece.columns]
        outputs.append(found if piece.last is None else found @ values(piece.last).t())
    return torch.cat(outputs, 1)


def whole(weight: Weight) -> Tensor:
    last = values(weight.last)
    return last if weight.first is None else last @ values(weight.first)


@pytest.mark.parametrize("seed", range(40))
def test_a_layout_gives_what_the_weights_give(seed: int) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    firsts = {f"first {k}": matrix(choose.randint(1, 4), N, coded=k == 2) for k in range(3)}
    weights = []
    for k in range(choose.randint(1, 4)):
        rows, coded = choose.randint(1, 6), choose.random() < 0.3
        if choose.random() < 0.3:
            weights.append(Weight(matrix(rows, N, coded=coded), None, f"dense {k}"))
        else:
            key = choose.choice([*firsts])
            first = firsts[key]
            weights.append(Weight(matrix(rows, first.shape[0], coded=coded), first, key))
    layout, x = laid_out(weights), torch.randn(5, N, dtype=torch.float64)
    oracle = torch.cat([x @ whole(weight).t() for weight in weights], 1)
    torch.testing.assert_close(multiplied(layout, x), oracle)
    assert len(layout.products) <= 2


def test_weights_of_one_first_factor_are_two_products() -> None:
    first = matrix(3, N)
    layout = laid_out([Weight(matrix(rows, 3), first, "q.first") for rows in (6, 2, 2)])
    assert [product.shape for product in layout.products] == [(3, N)]
    (piece,) = layout.pieces
    assert piece.last is not None
    assert piece.last.shape == (10, 3)


def test_own_first_factors_meet_the_input_together() -> None:
    layout = laid_out([Weight(matrix(6, rank), matrix(rank, N), str(rank)) for rank in (2, 3)])
    assert [product.shape for product in layout.products] == [(5, N)]
    assert [piece.columns for piece in layout.pieces] == [slice(0, 2), slice(2, 5)]


def test_dense_neighbours_are_one_piece() -> None:
    layout = laid_out([Weight(matrix(4, N), None, name) for name in "ab"])
    assert [(piece.columns, piece.last) for piece in layout.pieces] == [(slice(0, 8), None)]
