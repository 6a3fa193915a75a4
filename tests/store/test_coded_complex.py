"""Coded files of models with complex weights: matrices, and one for every mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.store.manifest import MANIFEST
from tests.api.test_complex import Operator, Rotations, fields
from tests.store.saved_models import weights_file

rotations = partial(Rotations, torch.complex64)


def data(make: Callable[[], nn.Module]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return fields(4) if make is Operator else [torch.randn(32, 24) for _ in range(4)]


def made(make: Callable[[], nn.Module], budget: Any) -> tuple[nn.Module, tensorize.Analysis]:
    torch.manual_seed(0)
    model = make().eval()
    analysis = tensorize.analyze(model, calibration=data(make), progress=False)
    return tensorize.apply(model, analysis.plan(budget), progress=False), analysis


EACH = pytest.mark.parametrize("make", [Operator, rotations], ids=["modes", "matrices"])


@EACH
def test_every_bit_is_kept(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    small, _ = made(make, 0.5)
    tensorize.save(small, tmp_path, coded="lossless")
    again = tensorize.load(tmp_path, model=make()).state_dict()
    assert any(value.is_complex() for value in again.values())
    for key, before in small.state_dict().items():
        assert torch.equal(before, again[key])


@EACH
def test_the_distance_of_a_complex_entry_is_bounded(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    small, _ = made(make, 0.5)
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-2))
    again = tensorize.load(tmp_path, model=make()).state_dict()
    told = json.loads((tmp_path / MANIFEST).read_text())["coding"]["tensors"]
    for key, before in small.state_dict().items():
        off = float((again[key].cdouble() - before.cdouble()).abs().max())
        assert off <= 1e-2
        assert off <= told[key]["found"] * (1 + 1e-12)
    x = data(make)[0]
    assert torch.allclose(tensorize.load(tmp_path, model=make())(x), small(x), atol=0.1)


@EACH
def test_within_bytes_complex_entries_are_exact_and_real_ones_coded(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    small, analysis = made(make, 0.5)
    whole = sum(value.nbytes for value in make().state_dict().values())
    tensorize.save(small, tmp_path, coded=tensorize.Budget(file=0.9), analysis=analysis)
    assert weights_file(tmp_path).stat().st_size <= 0.9 * whole
    again = tensorize.load(tmp_path, model=make()).state_dict()
    for key, before in small.state_dict().items():
        assert not before.is_complex() or torch.equal(before, again[key])


@EACH
def test_a_plan_counts_them_with_their_bytes(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    small, _ = made(make, tensorize.Budget(file=0.7, params=0.6))
    tensorize.save(small, tmp_path, coded=True)
    file = tensorize.report(small).plan.predicted.file
    assert file is not None
    assert weights_file(tmp_path).stat().st_size <= file


@EACH
def test_a_file_that_they_do_not_fit_in_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(BudgetError, match="file"):
        made(make, tensorize.Budget(file=100))
