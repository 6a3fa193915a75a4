"""Rows of zeros in a table stay zeros: in factors, refined, healed, initialized, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tests.marks import slow

FORMS = ["low_rank", "block", "tt"]
DATA = [torch.randint(0, 48, (16, 6), generator=torch.Generator().manual_seed(k)) for k in range(4)]


class Bag(nn.Module):
    """Sums what it looks up, so padding is to be nothing; ``tied``: it predicts by the table."""

    def __init__(self, tied: bool = False, rows: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(48, 64, padding_idx=rows[0])
        with torch.no_grad():
            self.table.weight[list(rows)] = 0
        self.head = nn.Linear(64, 64)
        self.tied = tied

    def forward(self, ids: Tensor) -> Tensor:
        x = self.head(self.table(ids).sum(1))
        return x @ self.table.weight.t() if self.tied else x


def rows_of(model: Any, rows: tuple[int, ...]) -> Tensor:
    found = model.table(torch.tensor(rows))
    same = tensorize.densify(model).table.weight[list(rows)]  # type: ignore[union-attr, index]
    assert torch.equal(found == 0, same == 0)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(0,), (47,), (3, 11, 30)])
def test_of_the_weights_alone(form: str, rows: tuple[int, ...], tmp_path: Path) -> None:
    model = Bag(rows=rows)
    formats = {"table*": form, "head*": "low_rank"}
    small = tensorize.compile(
        model, 0.5, example_inputs=(DATA[0],), metric="frobenius", formats=formats
    )
    assert tensorize.report(small).sites[0].format == form
    assert not rows_of(small, rows).any()
    assert small.table(torch.tensor([5])).any()  # type: ignore[operator]
    tensorize.save(small, tmp_path / "out")
    assert not rows_of(tensorize.load(tmp_path / "out", Bag(rows=rows)), rows).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [slow(False), True])
@pytest.mark.parametrize("refine", [slow(None), "refit", slow("polish")])
def test_refined_and_healed(form: str, tied: bool, refine: str | None) -> None:
    model = Bag(tied)
    formats = {"table*": form, "head*": "low_rank"}
    small = tensorize.compile(model, 0.6, calibration=DATA, formats=formats, refine=refine)
    assert tensorize.report(small).sites[0].format == form
    assert not rows_of(small, (0,)).any()
    tensorize.heal(small, model, DATA, steps=8)
    assert not rows_of(small, (0,)).any()
    assert small.table(torch.tensor([5])).any()  # type: ignore[operator]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["scaled", "spectral"])
def test_initialized(form: str, method: str) -> None:
    formats = {"table*": form, "head*": "low_rank"}
    small = tensorize.initialize(Bag(), 0.5, formats=formats, method=method)
    assert tensorize.report(small).sites[0].format == form
    assert not rows_of(small, (0,)).any()
    assert small.table(torch.tensor([5])).any()  # type: ignore[operator]


def test_trained_by_a_loop_of_the_users() -> None:
    small = tensorize.compile(
        Bag(), 0.5, calibration=DATA, formats={"table*": "tt", "head*": "low_rank"}
    )
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    for ids in DATA:
        small(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not rows_of(small, (0,)).any()


def test_a_factorization_that_cannot_keep_them_is_refused_before_the_work() -> None:
    mixes = tensorize.TTSpec((8, 6), (8, 8), (4,))
    with pytest.raises(tensorize.AnalysisError, match=r"^table\.weight: .*padding_idx") as caught:
        tensorize.initialize(Bag(), None, formats={"table*": mixes})
    assert "(48, 1)" in str(caught.value.way_out)
    keeps = tensorize.TTSpec((48, 1, 1), (1, 8, 8), (4, 4))
    small = tensorize.initialize(Bag(), None, formats={"table*": keeps, "head*": "dense"})
    assert not rows_of(small, (0,)).any()


def test_a_padding_row_that_holds_something_is_a_row_as_any_other() -> None:
    model = Bag()
    with torch.no_grad():
        model.table.weight[0] = 1.0
    small = tensorize.compile(
        model, 0.6, example_inputs=(DATA[0],), metric="frobenius", formats={"table*": "tt"}
    )
    assert rows_of(small, (0,)).any()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_leave_padding_out(mode: str) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(48, 64, padding_idx=0, mode=mode)
    model = nn.Sequential(bag, nn.Linear(64, 64))
    small: Any = tensorize.compile(
        model, 0.5, example_inputs=(DATA[0],), metric="frobenius", formats="low_rank"
    )
    assert not tensorize.densify(small)[0].weight[0].any()  # type: ignore[index]
    padded = torch.cat([DATA[0], torch.zeros(16, 3, dtype=torch.long)], 1)
    assert torch.allclose(small(padded), small(DATA[0]), atol=1e-6)
