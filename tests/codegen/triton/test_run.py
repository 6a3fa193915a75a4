"""Kernels of cores against the reference in float64: under triton's interpreter, and on a GPU.

The interpreter must be on before triton is imported, so the cases run in a process of their own.
``-m gpu`` runs them for real.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorize.codegen.device import launch
from tensorize.codegen.device.triton_env import interpreting, load
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.roles import NotCovered, Tiles, roles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work
from tests.codegen.triton.bounds import (
    DTYPES,
    Bounded,
    chains,
    check,
    draw,
    draw_cores,
    draw_rows,
    drawn,
    dtypes,
    low_ranks,
    poisoned,
    product,
    sides,
    some_rows,
    some_tiles,
    two_cores,
)
from tests.kernels import each_device

pytest.importorskip("triton", reason="triton is not installed")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


# -------------------------------------------------------------------------------- two cores, chains


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores), sides, some_rows, some_tiles, st.booleans())
def test_two_cores(device, dtype, spec, contract, rows, tiles, saved) -> None:
    torch.manual_seed(rows)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True, residual=True), saved=saved)
    try:
        source = triton_source.forward(work, tiles)
    except NotCovered:
        return
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias, residual = draw(work.outs, device, dtype), draw_rows(rows, work.outs[0], device, dtype)
    outputs = [poisoned(rows, work.outs[0], x)]
    role = roles(spec, contract)
    if saved:
        width = 1
        for axis in role.saved:
            width *= spec.size[axis]
        outputs.append(poisoned(rows, width, x))
    check(source, x, *cores, bias, residual, *outputs)
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    y.value += bias.double() + residual.double()
    y.bound += 1e-6 * (bias.double().abs() + residual.double().abs())
    y.check(outputs[0])
    if saved:
        assert not outputs[1].isnan().any()


@each_device
@drawn
@given(dtypes, chains, sides, some_rows)
def test_chains(device, dtype, spec, contract, rows) -> None:
    torch.manual_seed(rows)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True, residual=True))
    try:
        source = triton_source.forward(work, Tiles(rows=16, inner=16))
    except NotCovered:
        return
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias, residual = draw(work.outs, device, dtype), draw_rows(rows, work.outs[0], device, dtype)
    out = poisoned(rows, work.outs[0], x)
    check(source, x, *cores, bias, residual, out)
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    y.value += bias.double() + residual.double()
    y.bound += 1e-6 * (bias.double().abs() + residual.double().abs())
    y.check(out)


# ------------------------------------------------------------------------------ norms and epilogues


@each_device
@each_dtype
@pytest.mark.parametrize("contract", ["columns", "rows"])
def test_few_rows_give_the_same_bits_and_leave_the_counters_zero(device, dtype, contract) -> None:
    spec = TTSpec.low_rank(40, 50, 20)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True))
    tiles = Tiles(rows=16, inner=16, outer=16, slice=32, rank=16, inner_slice=32)
    source = triton_source.decode(work, tiles)
    rows = 18
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias = draw(work.outs, device, dtype)
    arrived = torch.zeros(2 * source.counters, dtype=torch.int32, device=device)
    found = []
    for _ in range(3):
        y = poisoned(rows, work.outs[0], x)
        options = {"precision": "ieee", "widen": interpreting(), "num_stages": 2}
        load(source.text)["launch"](x, *cores, bias, y, arrived, **options)
        assert not arrived.any()
        found.append(y.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    # A share is rounded for each slice of the summed entries.
    y = Bounded(y.value + bias.double(), 2 * y.bound + 1e-6 * bias.double().abs())
    y.check(found[0])


# ----------------------------------------------------------------------------------- without either


@pytest.mark.skipif(interpreting(), reason="kernels run here")
def test_without_a_gpu_and_the_interpreter_both_ways_out_are_told() -> None:
    from tensorize.base.errors import TensorizeError

    source = triton_source.forward(Work((TTSpec.low_rank(8, 8, 2),)), Tiles())
    x = torch.zeros(2, 8)
    with pytest.raises(TensorizeError, match=r"GPU.*TRITON_INTERPRET=1"):
        launch.run(source, x, torch.zeros(8, 2), torch.zeros(2, 8), torch.zeros(2, 8))
