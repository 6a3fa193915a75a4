"""Stacks of experts in factors: rows go to the experts that they chose; ranks share the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.formats.registry import format_of
from tensorize.ir.spec import TTSpec
from tensorize.serve.experts import Stack, mixed
from tensorize.serve.layout import columns_of_rank, rows_of_rank

E, N, WIDTH, T, K = 5, 12, 8, 9, 2


def activate(made: Tensor) -> Tensor:
    gates, rest = made.chunk(2, -1)
    return F.silu(gates) * rest


def stacks(pivoted: int) -> tuple[Stack, Stack, Tensor, Tensor]:
    """Both stacks of a layer, and their weights: (E, 2 WIDTH, N) and (E, N, WIDTH)."""
    made: list[Stack] = []
    whole: list[Tensor] = []
    for m, n in ((2 * WIDTH, N), (N, WIDTH)):
        spec = TTSpec.low_rank(m, n, 3, experts=E, pivoted=pivoted)
        held = [torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes]
        held += [torch.stack([torch.randperm(n) for _ in range(E)]) for _ in spec.indices]
        made.append(Stack.of(spec, held, torch.float64))
        whole.append(format_of(spec).reconstruct(spec, held))
    return made[0], made[1], whole[0], whole[1]


def choices() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, scores = (torch.randn(T, n, generator=draw, dtype=torch.float64) for n in (N, E))
    scores[:, -1] = -9.0  # nobody chooses the last one
    shares, chosen = scores.softmax(-1).topk(K)
    return x, shares, chosen


def expected(x: Tensor, shares: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = [
        sum(p * (down[e] @ activate(up[e] @ row)) for p, e in zip(ps, es, strict=True))
        for row, ps, es in zip(x, shares, chosen, strict=True)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows])


@pytest.mark.parametrize("pivoted", [0, 1])
def test_every_row_gets_what_its_experts_give(pivoted: int) -> None:
    up, down, *whole = stacks(pivoted)
    given = choices()
    torch.testing.assert_close(mixed(*given, up, down, activate), expected(*given, *whole))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dense", [False, True])
def test_what_ranks_give_is_the_whole_together(world: int, dense: bool) -> None:
    up, down, *whole = stacks(1)
    if dense:
        up, down = (Stack(weight) for weight in whole)
    given, width = choices(), WIDTH // world
    found = torch.zeros_like(given[0])
    for rank in range(world):
        rows = rows_of_rank([WIDTH] * 2, [width] * 2, rank, world)
        own = up.on_rank(rows, slice(None))
        narrow = down.on_rank([slice(None)], columns_of_rank(WIDTH, width, rank))
        found += mixed(*given, own, narrow, activate)
    torch.testing.assert_close(found, expected(*given, *whole))


def test_no_rows_are_no_work() -> None:
    up, down, *_ = stacks(0)
    x, shares, chosen = (each[:0] for each in choices())
    assert mixed(x, shares, chosen, up, down, activate).shape == (0, N)
