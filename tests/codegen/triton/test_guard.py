"""Kernels that check their own product: clean rows are right, flipped weights are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tensorize.algebra.reconstruct import reconstruct
from tensorize.codegen.device import guarded, launch
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import Tiles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tests.codegen.triton.bounds import DTYPES, draw, draw_cores, draw_rows, poisoned
from tests.kernels import each_device, holds_under_the_interpreter, low_rank

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_every_family_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, marks="slow and not gpu")


ROWS = 19
CUT = Tiles(rows=16, inner=16, outer=16, slice=32, rank=16, inner_slice=32)
FINISH = Epilogue(bias=True, activation="silu", scale=0.5, residual=True)
PAIR, NARROW = low_rank(70, 50, 20), low_rank(40, 50, 20)

FORWARD = {
    "pair": Work((PAIR,), epilogue=FINISH),
    "rms norm": Work((PAIR,), norm=Norm("rms", 1e-6), saved=True),
    "layer norm, back": Work((PAIR,), "rows", norm=Norm("layer", 1e-5), epilogue=FINISH),
    "gated": Work((PAIR, PAIR), gated=True, epilogue=FINISH, norm=Norm("rms", 1e-6)),
    "grouped": Work((PAIR, NARROW), norm=Norm("rms", 1e-6)),
    "shared": Work((PAIR, NARROW), shared=True),
    "two cores": Work((TTSpec((3, 40), (2, 20), (6,)),), epilogue=FINISH),
    "two cores, back": Work((TTSpec((3, 40), (2, 20), (6,)),), "rows"),
    "three cores": Work((TTSpec((3, 2, 2), (2, 4, 20), (6, 5)),), epilogue=FINISH),
    "three cores, back": Work((TTSpec((3, 2, 2), (2, 4, 20), (6, 5)),), "rows"),
    "absent indices": Work((TTSpec((1, 3, 2), (1, 1, 2), (2, 3)),)),
    "block": Work((TTSpec.block((30, 2), (2, 40), 6),), epilogue=FINISH),
}
DECODE = ("pair", "rms norm", "gated", "grouped", "shared")
QUICK = ("pair",)
CASES = [
    pytest.param(family, name, marks=() if name in QUICK else pytest.mark.slow)
    for family, names in (("forward", FORWARD), ("decode", DECODE))
    for name in names
]


def made(family: str, work: Work) -> Source:
    make = triton_source.forward if family == "forward" else triton_source.decode
    return make(replace(work, saved=work.saved and family == "forward"), CUT)


class Case:
    """A guarded launch with drawn inputs, and what is known of its weights."""

    def __init__(self, family: str, work: Work, device: str, dtype: torch.dtype) -> None:
        self.work = replace(work, guarded=True, saved=work.saved and family == "forward")
        self.bare = made(family, work)
        self.source = made(family, self.work)
        shapes = work.input_shapes(ROWS)
        self.inputs = [draw_rows(*shapes[0], device, dtype)]
        self.inputs += [
            draw_rows(*s, device, dtype) if s[0] == ROWS else draw(s, device, dtype, s[-1] ** -0.5)
            for s in shapes[1:]
        ]
        eps = torch.finfo(dtype).eps
        self.known = []
        for spec, cores in zip(work.specs, self.work.cores(self.inputs), strict=True):
            weight = whole(spec, cores)
            weight = weight if work.contract == "columns" else weight.mT
            signs = torch.randint(0, 2, (len(weight),), device=device).double() * 2 - 1
            sums = signs @ weight
            # What one core leaves is rounded, and norms are.
            relative = 4 * eps * float(weight.norm()) + 1e-6
            self.known.append(guarded.Known(signs, sums, relative, relative))

    def outputs(self) -> list[Tensor]:
        x, widths = self.inputs[0], list(self.work.results)
        if len(self.source.outputs) > len(widths):
            widths.append(20)
        return [poisoned(ROWS, width, x) for width in widths]

    def run(self) -> tuple[list[Tensor], list[int]]:
        cores = self.work.cores(self.inputs)
        own, wrong = guarded.operands(self.work, self.source.checked, cores, self.known)
        outputs = self.outputs()
        launch.run(self.source, *self.inputs, *own, wrong, *outputs)
        return outputs, wrong.tolist()


def whole(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
    return reconstruct(spec, [core.double() for core in cores])


@each_device
@pytest.mark.parametrize(("family", "name"), CASES)
def test_clean_rows_are_right_and_flipped_weights_are_counted(device, family, name) -> None:
    torch.manual_seed(0)
    case = Case(family, FORWARD[name], device, torch.float32)
    outputs, wrong = case.run()
    assert wrong == [0] * len(case.work.specs)
    bare = case.outputs()
    launch.run(case.bare, *case.inputs, *bare)
    assert all(torch.equal(a, b) for a, b in zip(outputs, bare, strict=True))
    for k, cores in enumerate(case.work.cores(case.inputs)):
        for number, core in enumerate(cores[:2]):
            words = core.data.view(torch.int32).view(-1)  # torch counts no write to it
            words[7 % len(words)] ^= 1 << 27
            found = case.run()[1]
            words[7 % len(words)] ^= 1 << 27
            everyone = case.work.shared and number == 1
            assert all((many > 0) == (everyone or j == k) for j, many in enumerate(found))
            assert max(found) <= ROWS * case.source.programs
    assert case.run()[1] == wrong


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["rms norm", "three cores", "block"])
def test_every_dtype_is_checked_before_its_result_is_rounded(device, dtype, name) -> None:
    torch.manual_seed(1)
    case = Case("forward", FORWARD[name], device, dtype)
    assert case.run()[1] == [0]
    core = case.work.cores(case.inputs)[0][0]
    core.data.view(-1)[5] += 2.0
    assert case.run()[1][0] > 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@each_device
def test_a_row_whose_input_is_not_finite_is_no_fault(device) -> None:
    case = Case("forward", FORWARD["pair"], device, torch.float32)
    case.inputs[0][3, 2] = float("inf")
    case.inputs[0][7, 1] = float("nan")
    assert case.run()[1] == [0]


@pytest.mark.slow
@each_device
def test_a_weight_that_was_damaged_before_its_first_launch_is_told(device) -> None:
    case = Case("forward", FORWARD["grouped"], device, torch.float32)
    case.work.cores(case.inputs)[1][0].data[3, 2] += 1.0
    assert [many > 0 for many in case.run()[1]] == [False, True]


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("spec", [low_rank(30, 70, 8), TTSpec((3, 2, 2), (1, 4, 3), (6, 5))])
def test_rows_of_tables_are_checked(device, spec) -> None:
    torch.manual_seed(2)
    source = triton_source.lookup(spec, replace(CUT, slice=32), guarded=True)
    (outputs,), cores = source.checked, draw_cores(spec, device, torch.float32)
    table = whole(spec, cores)
    signs = torch.randint(0, 2, (table.shape[1],), device=device).double() * 2 - 1
    known = [guarded.Known(signs, table @ signs, 1e-5, 1e-6)]
    work = Work((spec,), "rows", guarded=True)
    own, wrong = guarded.operands(work, [outputs], [cores], known)
    squares = table.square().sum(1).float()
    rows = torch.tensor([0, 5, 11, 5, 99, -1], device=device)

    def run() -> int:
        wrong.zero_()
        y = poisoned(len(rows), table.shape[1], cores[0])
        launch.run(source, rows, *cores, *own[:-1], squares, own[-1], wrong, y)
        assert y[-1].isnan().all()
        return int(wrong)

    assert run() == 0
    cores[1].data.view(-1)[3] += 1.0
    assert run() > 0
