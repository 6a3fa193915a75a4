"""Kernels of lookups and of gradients against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorize.codegen.device import launch
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.roles import NotCovered, Tiles, roles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work
from tests.codegen.triton.bounds import (
    Bounded,
    chains,
    check,
    draw_cores,
    draw_rows,
    drawn,
    dtypes,
    low_ranks,
    poisoned,
    product,
    reconstruct_any,
    sides,
    some_rows,
    some_tiles,
    two_cores,
)
from tests.kernels import each_device

pytest.importorskip("triton", reason="triton is not installed")


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores, chains), some_rows, some_tiles)
def test_lookups(device, dtype, spec, rows, tiles) -> None:
    torch.manual_seed(rows)
    try:
        source = triton_source.lookup(spec, tiles)
    except NotCovered:
        return
    cores = draw_cores(spec, device, dtype)
    row = torch.randint(spec.shape[0], (rows,), device=device)
    y = poisoned(rows, spec.shape[1], cores[0])
    check(source, row, *cores, y)
    one = torch.eye(spec.shape[0], dtype=torch.float64, device=device)[row]
    product(one, one, spec, cores, "rows").check(y)


@each_device
def test_a_row_that_the_table_lacks_is_not_a_number(device) -> None:
    for spec in (TTSpec.low_rank(9, 20, 3), TTSpec((3, 3), (4, 5), (2,))):
        source = triton_source.lookup(spec, Tiles(rows=16))
        cores = draw_cores(spec, device, torch.float32)
        y = torch.zeros(4, 20, device=device)
        launch.run(source, torch.tensor([0, 9, -1, 8], device=device), *cores, y)
        assert y[[1, 2]].isnan().all()
        assert not y[[0, 3]].isnan().any()


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores), sides, some_rows, some_tiles)
def test_gradients_of_cores(device, dtype, spec, contract, rows, tiles) -> None:
    torch.manual_seed(rows)
    other = "rows" if contract == "columns" else "columns"
    try:
        source = triton_source.gradients(spec, contract, tiles)
        ahead = triton_source.forward(Work((spec,), contract, saved=True), tiles)
        back = triton_source.forward(Work((spec,), other, saved=True), tiles)
    except NotCovered:
        return
    work = Work((spec,), contract)
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    dy = draw_rows(rows, work.outs[0], device, dtype)
    width = {}
    for side in (contract, other):
        width[side] = 1
        for axis in roles(spec, side).saved:
            width[side] *= spec.size[axis]
    t, s = poisoned(rows, width[contract], x), poisoned(rows, width[other], x)
    launch.run(ahead, x, *cores, poisoned(rows, work.outs[0], x), t)
    launch.run(back, dy, *cores, poisoned(rows, work.into, x), s)
    found = [torch.full_like(core, float("nan")) for core in cores]
    launch.run(source, x, dy, t, s, *found)
    exact = [core.double().requires_grad_() for core in cores]
    weight = reconstruct_any(spec, exact)
    y = x.double() @ (weight.mT if contract == "columns" else weight)
    expected = torch.autograd.grad(y, exact, dy.double())
    sizes = [core.double().abs().requires_grad_() for core in cores]
    weight = reconstruct_any(spec, sizes)
    y = x.double().abs() @ (weight.mT if contract == "columns" else weight)
    bounds = torch.autograd.grad(y, sizes, dy.double().abs())
    terms = sum(size for _, size in spec.sizes) + rows
    eps = 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps
    for got, want, size in zip(found, expected, bounds, strict=True):
        Bounded(want, eps * size).check(got)
