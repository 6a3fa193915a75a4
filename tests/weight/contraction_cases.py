"""Specs to train, and operands for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.codegen.machine import rates
from tensorize.ir.orders import ContractionPlan
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_time import timed_plan

SIDES = ("columns", "rows")

SPECS = [
    TTSpec((6,), (5,), ()),
    TTSpec((8, 9), (10, 8), (3,)),
    TTSpec((8, 9), (10, 8), (60,)),
    TTSpec((2, 3), (3, 2), (2,), experts=2),
    TTSpec((4, 3, 8), (8, 2, 4), (6, 5)),
    TTSpec((2, 3, 2, 3), (3, 2, 3, 2), (4, 6, 4)),
    TTSpec((1, 4, 1), (3, 1, 3), (2, 3)),
    TTSpec.block((3, 4), (5, 2), 2),
    TTSpec.block((8, 9), (10, 8), 3, experts=2),
    TTSpec.block((1, 5), (1, 4), 2),
]

quick = settings(max_examples=30, deadline=None, derandomize=True)


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [draw(s, k, dtype).requires_grad_() for k, s in enumerate(spec.core_shapes)]


def draw_x(spec: TTSpec, contract: str, lead: Sequence[int], dtype=torch.float64) -> Tensor:
    features = spec.shape[-1] if contract == "columns" else spec.shape[-2]
    return draw((*spec.shape[:-2], *lead, features), 99, dtype).requires_grad_()


def close(got: Tensor | None, want: Tensor | None, eps: float = 1e-11) -> None:
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    if want.numel():
        assert float((got - want).abs().max()) <= eps * max(1.0, float(want.abs().max()))


wanted_of = st.lists(st.booleans(), min_size=5, max_size=5)


def chosen(spec: TTSpec, flags: list[bool]) -> tuple[int | str, ...]:
    operands = ("x", *range(len(spec.cores)))
    return tuple(o for o, flag in zip(operands, flags, strict=False) if flag) or operands


def in_use(spec: TTSpec, contract: str = "columns") -> ContractionPlan:
    """The orders that run, by predicted time."""
    return timed_plan(spec, contract, rates.current())


def gradients(y: Tensor, operands: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, operands, draw(y.shape, seed, y.dtype))
