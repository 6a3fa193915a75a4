"""Kernels that read the columns of x by number: weights that store no identity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tensorize.codegen.device import guarded, launch, reference
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.roles import NotCovered, Tiles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tests.codegen.triton.bounds import DTYPES, draw, draw_rows, poisoned
from tests.kernels import each_device, holds_under_the_interpreter, low_rank, pivoted

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, marks="slow and not gpu")


ROWS = 19
CUT = Tiles(rows=16, inner=16, outer=16, slice=32)
FINISH = Epilogue(bias=True, activation="silu", residual=True)

WORKS = {
    "one by one": Work((pivoted(40, 50, 20),), norm=Norm("rms", 1e-6), epilogue=FINISH),
    "by groups": Work((pivoted(40, 48, 20, 4), pivoted(30, 48, 6, 4))),
    "nothing moved": Work((pivoted(40, 48, 20, 48),), norm=Norm("layer", 1e-5)),
    "shared": Work((pivoted(40, 50, 20), pivoted(30, 50, 20)), shared=True, norm=Norm("rms", 1e-6)),
    "gated": Work((pivoted(40, 50, 20),) * 2, shared=True, gated=True, epilogue=FINISH),
    "of no odd size": Work((pivoted(32, 64, 32),)),
}


def inputs_of(work: Work, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = work.input_shapes(ROWS)
    found = [draw_rows(*shapes[0], device, dtype)]
    for shape in shapes[1:]:
        rows = shape[0] == ROWS
        found.append(
            draw_rows(*shape, device, dtype)
            if rows
            else draw(shape, device, dtype, shape[-1] ** -0.5)
        )
    for k in work.orders:
        found[k] = torch.randperm(len(found[k]), device=device).int()
    return found


@each_device
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, marks=() if dtype == torch.float32 and name in ("one by one", "by groups")
            else pytest.mark.slow
        )
        for name in WORKS
        for dtype in DTYPES
    ],
)  # fmt: skip
def test_results_are_those_of_torch_in_float64(device, name, dtype) -> None:
    torch.manual_seed(0)
    work = WORKS[name]
    inputs = inputs_of(work, device, dtype)
    outputs = [poisoned(ROWS, width, inputs[0]) for width in work.results]
    launch.run(triton_source.forward(work, CUT), *inputs, *outputs)
    places = set(work.orders)
    wide = [value if k in places else value.double() for k, value in enumerate(inputs)]
    # The interpreter cuts bfloat16 off; a norm and what is between the factors are rounded.
    within = 16 * torch.finfo(dtype).eps
    for mine, right in zip(outputs, reference.run(work, wide), strict=True):
        assert (mine.double() - right).abs().max() <= within * right.abs().max().clamp(min=1.0)


@each_device
def test_a_guarded_launch_counts_what_is_wrong_in_a_factor_and_in_the_order(device) -> None:
    torch.manual_seed(0)
    work = replace(WORKS["one by one"], guarded=True)
    source = triton_source.forward(work, CUT)
    inputs = inputs_of(work, device, torch.float32)
    (cores,) = work.cores(inputs)
    order = cores[2].long()
    weight = torch.empty(40, 50, device=device).double()
    weight[:, order[:20]] = cores[0].double()
    weight[:, order[20:]] = cores[0].double() @ cores[1].double()
    signs = torch.ones(40, device=device).double()
    known = [guarded.Known(signs, signs @ weight, 1e-5, 1e-5)]

    def run() -> int:
        own, wrong = guarded.operands(work, source.checked, [cores], known)
        launch.run(source, *inputs, *own, wrong, poisoned(ROWS, 40, inputs[0]))
        return int(wrong)

    assert run() == 0
    cores[1].data[3, 2] += 1.0
    assert run() > 0
    cores[1].data[3, 2] -= 1.0
    cores[2].data[[1, 30]] = cores[2].data[[30, 1]]
    assert run() > 0


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (Work((pivoted(40, 50, 20),), "rows"), "has an order"),
        (Work((pivoted(40, 50, 20),), saved=True), "has an order"),
        (Work((pivoted(40, 50, 20),) * 2, gated=True), "has an order"),
        (Work((pivoted(40, 50, 50),)), "no second factor"),
    ],
)
def test_what_reads_no_columns_by_number_is_refused(work: Work, why: str) -> None:
    with pytest.raises(NotCovered, match=why):
        triton_source.forward(work, CUT)


def test_few_rows_lookups_and_gradients_keep_the_gather() -> None:
    spec = pivoted(40, 50, 20)
    for make in (
        lambda: triton_source.decode(Work((spec,)), CUT),
        lambda: triton_source.lookup(spec, CUT),
        lambda: triton_source.gradients(spec, "columns", CUT),
    ):
        with pytest.raises(NotCovered):
            make()


def test_columns_that_are_not_stored_are_not_multiplied() -> None:
    from tensorize.codegen.triton.roles import flops_a_row

    plain, fewer = low_rank(40, 50, 20), pivoted(40, 50, 20)
    assert flops_a_row(plain, "columns") - flops_a_row(fewer, "columns") == 2 * 20 * 20
    assert isinstance(fewer, TTSpec)
