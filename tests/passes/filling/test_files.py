"""Files within a limit on bytes, which are as predicted, or on the loss; and what is refused."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.passes.filling.coder import coded, within_bytes
from tensorize.passes.filling.fill import Filling
from tensorize.passes.filling.refit import Refit
from tensorize.passes.filling.weights import weights_of
from tensorize.store.manifest import MANIFEST
from tests.store.saved_models import weights_file


class Net(nn.Module):
    """A table, weights of one input, and a chain of others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 48)
        self.q, self.k = nn.Linear(48, 48), nn.Linear(48, 48)
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 60)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        x = x + torch.sigmoid(self.q(x)) * self.k(x)
        return Outputs(self.head(self.norm(x + self.down(torch.relu(self.up(x))))))


class Outputs(dict[str, torch.Tensor]):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits=logits)
        self.logits = logits


def ids(seed: int, count: int = 16) -> torch.Tensor:
    return torch.randint(60, (count, 12), generator=torch.Generator().manual_seed(seed))


@cache
def dense() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@cache
def analysis() -> tensorize.Analysis:
    data = [ids(seed) for seed in range(8)]
    return tensorize.analyze(dense(), calibration=data, precision="auto", progress=False)


@cache
def compressed(budget: float, **options: Any) -> nn.Module:
    plan = analysis().plan(tensorize.Budget(params=budget), precision=None)
    return tensorize.apply(dense(), plan, progress=False)


def saved(small: nn.Module, folder: Path, **limit: float) -> tuple[int, dict[str, Any]]:
    """The bytes of the file of weights, and what the manifest says of it."""
    tensorize.save(small, folder, coded=tensorize.Budget(**limit), analysis=analysis())
    told = json.loads((folder / MANIFEST).read_text())["coding"]
    return weights_file(folder).stat().st_size, told


def divergence(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        p, q = (m(ids(99, 64)).logits.log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("share", [0.2, 0.12])
def test_a_file_has_at_most_its_bytes_and_not_far_fewer(
    budget: float, share: float, tmp_path: Path
) -> None:
    size, _ = saved(compressed(budget), tmp_path, file=share)
    whole = sum(p.nbytes for p in dense().parameters())
    assert 0.9 * share * whole < size <= share * whole
    size, _ = saved(compressed(budget), tmp_path, file=int(share * whole))
    assert 0.9 * share * whole < size <= share * whole


def test_the_model_in_it_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    _, told = saved(compressed(0.5), tmp_path, file=0.2)
    one, other = (tensorize.load(tmp_path, model=Net()) for _ in range(2))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
        off = float((value.double() - compressed(0.5).state_dict()[key].double()).abs().max())
        assert told["tensors"][key]["found"] == off
    assert divergence(compressed(0.5), one) < 0.01
    assert torch.equal(one.get_parameter("norm.weight"), dense().get_parameter("norm.weight"))


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_a_loss_is_kept_and_predicted(budget: float, tmp_path: Path) -> None:
    before, sizes = None, []
    for loss in (1e-3, 1e-2):
        size, told = saved(compressed(budget), tmp_path, loss=loss)
        assert told["loss"] == pytest.approx(loss, rel=0.15)
        small = tensorize.load(tmp_path, model=Net())
        lost = divergence(compressed(budget), small)
        assert 0.3 * loss < lost < 1.6 * loss
        assert before is None or lost > before
        before = lost
        sizes.append(size)
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("theta", [1e-8, 1e-7, 1e-6])
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_sizes_are_predicted_without_coding(budget: float, theta: float) -> None:
    filling = Filling(list(weights_of(compressed(budget), analysis().program.spectra)))
    expected = filling.expected(theta)
    made = within_bytes(filling, round(expected.bytes), lambda _: 0)
    assert made.bytes == pytest.approx(made.expected.bytes, rel=0.02)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_what_codes_lose_is_expected_without_choosing_them(budget: float) -> None:
    filling = Filling(list(weights_of(compressed(budget), analysis().program.spectra)))
    expected = filling.expected(1e-7)
    assert coded(filling, expected).distortion == pytest.approx(expected.distortion, rel=0.15)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_codes_that_are_chosen_for_what_weights_meet_cost_less(budget: float) -> None:
    small = compressed(budget)
    weights = list(weights_of(small, analysis().program.spectra))
    refit = Refit(small, analysis().calibration, lambda batch, name: None)
    lost = []
    for each in (None, refit):
        codes = {
            id(tensor): matrix.numbers
            for group, matrices in Filling(weights, each).codes(1e-5)
            for tensor, matrix in zip(
                (t for weight in group for t in weight.tensors), matrices, strict=True
            )
        }
        made = copy.deepcopy(small)
        with torch.no_grad():
            for before, after in zip(small.parameters(), made.parameters(), strict=True):
                if id(before) in codes:
                    after.copy_(codes[id(before)].reshape(after.shape))
        lost.append(divergence(small, made))
    assert 0.01 < lost[1] < 0.95 * lost[0]


def test_a_model_is_as_it_was_after_codes_were_chosen_for_it(tmp_path: Path) -> None:
    small = compressed(0.5)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    saved(small, tmp_path, file=0.15)
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in before.items())


def test_every_weight_is_coded_once_and_what_shares_a_factor_together() -> None:
    small = compressed(0.5)
    weights = list(weights_of(small, analysis().program.spectra))
    coded = [id(tensor) for weight in weights for tensor in weight.tensors]
    assert len(coded) == len(set(coded))
    matrices = {id(p) for p in small.parameters() if p.dim() == 2}
    assert set(coded) == matrices


def test_fewer_bytes_than_there_are_without_anything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="bytes at least"):
        saved(compressed(0.5), tmp_path / "out", file=3000)
    assert not (tmp_path / "out").exists()


def test_without_an_analysis_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="analysis=") as caught:
        tensorize.save(compressed(0.5), tmp_path, coded=tensorize.Budget(file=0.2))
    assert "cache_dir" in str(caught.value)
    assert "entry_error" in str(caught.value)


def test_an_analysis_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = tensorize.analyze(Net(), metric="frobenius", example_inputs=(ids(0),), progress=False)
    with pytest.raises(AnalysisError, match="another model"):
        tensorize.save(compressed(0.5), tmp_path, coded=tensorize.Budget(file=0.2), analysis=other)


def test_what_the_plan_finds_in_the_cache_will_do(tmp_path: Path) -> None:
    data = [ids(seed) for seed in range(4)]
    small = tensorize.compile(
        dense(), 0.5, calibration=data, cache_dir=tmp_path / "cache", progress=False
    )
    tensorize.save(small, tmp_path / "out", coded=tensorize.Budget(file=0.2))
    whole = sum(p.nbytes for p in dense().parameters())
    assert weights_file(tmp_path / "out").stat().st_size <= 0.2 * whole


def test_weights_alone_allow_a_limit_on_bytes_and_none_on_the_loss(tmp_path: Path) -> None:
    known = tensorize.analyze(dense(), metric="frobenius", example_inputs=(ids(0),), progress=False)
    small = tensorize.apply(dense(), known.plan(0.5), progress=False)
    tensorize.save(small, tmp_path, coded=tensorize.Budget(file=0.2), analysis=known)
    again = tensorize.load(tmp_path, model=Net())
    assert divergence(small, again) < 0.05
    with pytest.raises(AnalysisError, match="saw no data"):
        tensorize.save(small, tmp_path, coded=tensorize.Budget(loss=0.1), analysis=known)


@pytest.mark.parametrize("others", [{}, {"params": 0.5}])
def test_a_plan_says_the_file_and_save_writes_it(others: dict[str, Any], tmp_path: Path) -> None:
    plan = analysis().plan(tensorize.Budget(file=0.15, **others), precision=None)
    whole = sum(p.nbytes for p in dense().parameters())
    assert plan.predicted.file == int(0.15 * whole)
    assert tensorize.Plan.from_json(plan.to_json()) == plan.alone
    assert plan.predicted.parameters <= others.get("params", 1.0) * plan.dense.parameters
    small = tensorize.apply(dense(), plan, progress=False)
    tensorize.save(small, tmp_path, coded=True)
    assert weights_file(tmp_path).stat().st_size == pytest.approx(plan.predicted.file, rel=0.02)
    assert weights_file(tmp_path).stat().st_size <= plan.predicted.file


def test_a_plan_without_a_file_has_none_to_write(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="chose no size"):
        tensorize.save(compressed(0.5), tmp_path, coded=True)
    plan = analysis().plan(0.5)
    assert plan.predicted.file is None
    assert "file" not in json.loads(plan.to_json())["predicted"]


def test_what_no_plan_keeps_is_refused() -> None:
    with pytest.raises(BudgetError, match="coded="):
        analysis().plan(tensorize.Budget(entry_error=1e-3))
    with pytest.raises(BudgetError, match="not limited together"):
        analysis().plan(tensorize.Budget(file=0.1, loss=0.1))
