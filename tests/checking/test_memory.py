"""Integer sums of memory: any single word is found and put back exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.checking.guarding import guard_of
from tensorize.checking.memory import Memory, Sums, words_of
from tests.checking.guarded_models import BATCH, guarded
from tests.models import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8)
SHAPES = ((37, 53), (41,), (1,), (3, 4, 5), (64, 1))


def holder(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


def nothing(name: str) -> None:
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_bit_of_any_entry_is_mended(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (100 * torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    module, want, memory = holder(tensor), tensor.clone(), Memory()
    memory.remember(module)
    draw = random.Random(0)
    for _ in range(20):
        words: Any = words_of(tensor)
        size = 8 * tensor.itemsize
        bit = draw.randrange(size)
        mask = -(2**bit) if bit == size - 1 else 2**bit
        words.data.view(-1)[draw.randrange(tensor.numel())] ^= mask
        mends, lost = memory.scrub(module, nothing)
        assert [mend.entries for mend in mends] == [1]
        assert not lost
        assert torch.equal(tensor, want)


def test_several_words_are_mended_where_they_can_be_told_apart() -> None:
    tensor = torch.arange(60.0).reshape(6, 10)
    want, sums = tensor.clone(), Sums.of(tensor)
    assert sums is not None
    tensor.data[2, 3:6] = 0.5  # one row
    assert sums.mend(tensor) == 3
    tensor.data[1, 2], tensor.data[4, 7] = 9e9, -3.0  # two rows, two columns, two offsets
    assert sums.mend(tensor) == 2
    assert torch.equal(tensor, want)


def test_words_that_cannot_be_told_apart_stay_as_they_are() -> None:
    tensor = torch.zeros(6, 10)
    sums = Sums.of(tensor)
    assert sums is not None
    tensor.data[1:3, 4:6] = 1.0
    damaged = tensor.clone()
    assert sums.mend(tensor) is None
    assert torch.equal(tensor, damaged)


def test_a_transposed_tensor_is_looked_at_as_it_lies_in_memory() -> None:
    tensor = torch.randn(5, 7).t()
    module, want, memory = holder(tensor), tensor.clone(), Memory()
    memory.remember(module)
    tensor.data[3, 2] += 1
    memory.scrub(module, nothing)
    assert torch.equal(tensor, want)
    assert words_of(torch.zeros(1).expand(4)) is None  # not in one piece: told as not covered
    assert Memory().missing(holder(torch.zeros(1).expand(4))) == ["held"]


def test_a_saved_model_mends_itself_from_its_artefact_and_is_guarded_when_loaded(
    tmp_path: Path,
) -> None:
    case = CASES["mlp"]
    batches = [case.batch(seed) for seed in range(2, 6)]
    model: Any = tensorize.compile(case.model(), 0.6, calibration=batches)
    tensorize.guard(model, calibration=batches)
    want = case.output(model)
    tensorize.save(model, tmp_path)
    again: Any = tensorize.load(tmp_path, model=case.model())
    limits = [site.limits for site in tensorize.guard_report(model).sites]
    assert [site.limits for site in tensorize.guard_report(again).sites] == limits
    for damaged in (model, again):
        damaged.head.first.weight.data[1:3, 2:5] = 7.0
        assert torch.equal(case.output(damaged), want)
        (mend,) = tensorize.guard_report(damaged).mends
        assert (mend.tensor, mend.by) == ("head.first.weight", "the artefact's copy")


def test_a_model_that_was_not_guarded_is_loaded_without_a_guard(tmp_path: Path) -> None:
    case = CASES["mlp"]
    batches = [case.batch(2)]
    small = tensorize.compile(case.model(), 0.6, calibration=batches)
    tensorize.save(small, tmp_path)
    with pytest.raises(tensorize.TensorizeError, match="is not guarded"):
        tensorize.scrub(tensorize.load(tmp_path, model=case.model()))


def test_what_checks_multiply_with_is_made_anew_of_a_whole_weight() -> None:
    model: Any = guarded("low rank")
    guard: Any = guard_of(model)
    guard.sites["up.weight"].uses["columns"].rounded[torch.float32].sums.data[3] += 1
    with torch.no_grad():
        model(BATCH)
    (mend,) = tensorize.scrub(model)
    assert mend.tensor == "up.weight (its check)"
    assert tensorize.scrub(model) == []
