"""Files within a limit on bytes, which are as predicted, or on the loss; and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import average
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.coding.groups import Coded, sizes_of
from tensorize.passes.allocate.candidates import FILE, other_costs
from tensorize.passes.curves.filed import Filed
from tensorize.passes.filling.coder import coded, within_bytes
from tensorize.passes.filling.fill import Filling
from tensorize.passes.filling.refit import Refit
from tensorize.passes.filling.weights import Pairs, weights_of
from tensorize.store.manifest import MANIFEST
from tests.marks import slow
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


@pytest.mark.parametrize("budget", [slow(1.0), 0.5])
@pytest.mark.parametrize("share", [slow(0.2), 0.12])
def test_a_file_has_at_most_its_bytes_and_not_far_fewer(
    budget: float, share: float, tmp_path: Path
) -> None:
    size, _ = saved(compressed(budget), tmp_path, file=share)
    whole = sum(p.nbytes for p in dense().parameters())
    assert 0.9 * share * whole < size <= share * whole
    size, _ = saved(compressed(budget), tmp_path, file=int(share * whole))
    assert 0.9 * share * whole < size <= share * whole


def test_a_file_that_is_larger_than_it_need_be_loses_next_to_nothing(tmp_path: Path) -> None:
    """Codes have fifteen bits at most: steps stay as wide as entries want."""
    size, told = saved(compressed(0.5), tmp_path, file=1.0)
    whole = sum(p.nbytes for p in dense().parameters())
    assert size < 0.5 * whole
    assert told["loss"] < 1e-5
    assert divergence(compressed(0.5), tensorize.load(tmp_path, model=Net())) < 1e-5


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


def test_what_is_told_is_of_data_that_codes_were_not_chosen_for(tmp_path: Path) -> None:
    """Of few data: on them codes lose a quarter less, and if chosen on a part of them as much
    more."""
    off = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = Net().eval()
        data = [ids(100 * seed + k, 3) for k in range(8)]
        found = tensorize.analyze(model, calibration=data, formats="dense", progress=False)
        small = tensorize.apply(model, found.plan(1.0), progress=False)
        folder = tmp_path / str(seed)
        tensorize.save(small, folder, coded=tensorize.Budget(file=0.1), analysis=found)
        told = json.loads((folder / MANIFEST).read_text())["coding"]
        lost = divergence(small, tensorize.load(folder, model=Net()))
        off.append(math.log(told["loss"] / lost))
        low, high = told["loss_interval"]
        assert low < lost < high
    assert abs(sum(off)) / len(off) < 0.15


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


def lost(plan: tensorize.Plan, file: int) -> float:
    """What a plan and the codes of so many bytes lose by the curves."""
    small = tensorize.apply(dense(), plan, progress=False)
    filling = Filling(list(weights_of(small, analysis().program.spectra)))
    expected = filling.within_bytes(file - other_costs(analysis().program)[FILE])
    assert expected is not None
    return sum(site.predicted_loss for site in plan.sites) + expected.distortion


@pytest.mark.parametrize(
    ("share", "others", "gains"),
    [
        (0.1, {}, 0.9),
        (0.15, {"params": 0.5}, 1.05),
        pytest.param(0.1, {"params": 0.7, "flops": 0.6}, 1.0, marks=pytest.mark.slow),
    ],
)
def test_ranks_are_those_that_lose_least_in_a_file_of_the_size(
    share: float, others: dict[str, float], gains: float
) -> None:
    together = analysis().plan(tensorize.Budget(file=share, **others), precision=None, refine=None)
    ranks_first = analysis().plan(
        tensorize.Budget(**(others or {"params": 1.0})), precision=None, refine=None
    )
    assert together.predicted.file is not None
    limits = tensorize.Budget(**others).limits(together.dense) if others else {}
    assert together.predicted.parameters <= limits.get("params", together.dense.parameters)
    assert together.predicted.flops <= limits.get("flops", together.dense.flops)
    sizes = [lost(plan, together.predicted.file) for plan in (together, ranks_first)]
    assert sizes[0] <= gains * sizes[1]


def test_a_file_and_a_loss_are_limited_together() -> None:
    limit = tensorize.Budget(file=0.12, loss=1.0)
    assert analysis().plan(limit, precision=None).predicted.file
    with pytest.raises(BudgetError, match="predicted rise of the loss") as caught:
        analysis().plan(tensorize.Budget(file=0.1, loss=1e-6), precision=None)
    named = float(re.search(r"allow loss=([^,]+),", str(caught.value))[1])  # type: ignore[index]
    analysis().plan(tensorize.Budget(file=0.1, loss=named), precision=None)


def test_a_file_that_is_too_small_for_any_plan_names_one_that_is_not() -> None:
    with pytest.raises(BudgetError, match="bytes in a file") as caught:
        analysis().plan(tensorize.Budget(file=500), precision=None)
    least = re.search(r"smallest feasible value is ([\d,]+)", str(caught.value))
    assert least is not None
    analysis().plan(tensorize.Budget(file=int(least[1].replace(",", ""))), precision=None)


@pytest.mark.parametrize("theta", [1e-8, 1e-7, 1e-6])
def test_what_weights_take_and_lose_is_told_by_their_sizes_alone(theta: float) -> None:
    filed = Filed(theta)
    curves = analysis().program.spectra
    filling = Filling(list(weights_of(dense(), curves)))
    expected, found = filling.expected(theta), [filed.dense(curve) for curve in curves.values()]
    assert sum(size for size, _ in found) == pytest.approx(expected.bytes, rel=0.15)
    assert sum(cost for _, cost in found) == pytest.approx(expected.distortion, rel=0.15)


@pytest.mark.parametrize("theta", [1e-8, 1e-7])
def test_what_factors_take_and_lose_is_told_by_their_singular_values(theta: float) -> None:
    filed, curves = Filed(theta), analysis().program.spectra
    cost, told_size, told_cost, coded = 0.0, 0.0, 0.0, list[Coded]()
    for name, curve in curves.items():
        metric, (m, n) = average(curve.metrics), curve.site.matrix
        rank = min(m, n) // 2
        weight = dense().get_parameter(name).detach()
        left, right = best_factors(weight, metric, rank)
        found, own = Pairs((left,), right, None, (metric,)).expected(theta)
        coded, cost = coded + found, cost + own
        (sizes, costs), _ = filed.factors((curve,), [curve.distortion.numpy()])
        told_size, told_cost = told_size + sizes[rank], told_cost + costs[rank]
    assert told_size == pytest.approx(sizes_of(coded), rel=0.2)
    assert told_cost == pytest.approx(cost, rel=0.35)
