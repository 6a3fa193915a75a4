"""Plans with fewer bits are tried, and what a distortion of them counts is what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.capture.inputs import batch_of
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.allocate.forms import BITS, BOTH
from tensorize.passes.observe.loss import PreservedLoss, split
from tensorize.passes.observe.outputs import call
from tensorize.passes.predict.families import MIXED_LOSSES, REFIT_LOSSES, worth_of_families
from tensorize.passes.predict.predictor import Predictor, Trial

RANKS = Predictor((Trial(0.01, 0.02, 0.0, 0.1), Trial(1.0, 3.0, 0.0, 0.5)), "nats", held_out=True)


class Net(nn.Module):
    """Weights of falling singular values, so that both ranks and bits pay."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))
        for layer in self.layers:
            scale = torch.logspace(0, -1.5, 48) * 3
            draws = torch.randn(2, 48, 48, generator=generator)
            left, right = (torch.linalg.qr(draw)[0] for draw in draws)
            layer.weight.data = left @ torch.diag(scale) @ right

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 48, generator=generator) for _ in range(8)]


@pytest.fixture(scope="module")
def analysis(model: nn.Module, batches: list[Tensor]) -> tensorize.Analysis:
    return tensorize.analyze(model, calibration=batches, precision="auto")


# -------------------------------------------------------------------------------- what counts


def trial(raw: float, measured: float, spread: float = 0.0) -> Trial:
    return Trial(raw, measured, spread, 0.1)


def test_a_family_counts_by_the_ranks_that_cost_as_much() -> None:
    trials = [trial(x, RANKS.predict(x / 2)[0]) for x in (0.01, 0.1, 1.0)]
    few, many = (worth_of_families(RANKS, {BITS: trials * n})[BITS] for n in (1, 50))
    assert many == pytest.approx(0.5, rel=0.01)
    assert many < few < 1


def test_what_scatters_says_little() -> None:
    sure, unsure = (
        worth_of_families(RANKS, {BOTH: [trial(0.1, RANKS.predict(0.3)[0], spread)]})[BOTH]
        for spread in (0.0, 5.0)
    )
    assert 1 < unsure < 1.02 < sure < 3


def test_what_was_not_tried_counts_as_ranks_do() -> None:
    assert worth_of_families(RANKS, {BITS: []}) == {BITS: 1.0}


# ------------------------------------------------------------------------ by trials of its own kind

BITS_LOSE_LESS = replace(
    RANKS,
    trials=(*RANKS.trials, Trial(0.01, 0.01, 0.0, 0.1, "polish")),
    rounded=(Trial(0.01, 0.004, 0.0, 0.1), Trial(1.0, 0.4, 0.0, 0.4)),
)


def test_plans_with_bits_are_predicted_by_trials_with_bits() -> None:
    """And plans of ranks alone as if no bits had been analysed."""
    found = BITS_LOSE_LESS
    assert [found.predict(raw)[0] for raw in (0.01, 0.1, 1.0)] == [
        RANKS.predict(raw)[0] for raw in (0.01, 0.1, 1.0)
    ]
    assert found.with_bits.predict(0.1)[0] == pytest.approx(0.04)
    assert found.with_bits.inverse(0.04) == pytest.approx(0.1)


def test_what_was_refined_of_ranks_alone_gains_as_much_with_bits() -> None:
    assert BITS_LOSE_LESS.predict(0.01, "polish")[0] == pytest.approx(0.01)  # of 0.02
    assert BITS_LOSE_LESS.with_bits.predict(0.01, "polish")[0] == pytest.approx(0.002)


def test_without_such_trials_there_is_one_prediction() -> None:
    assert RANKS.with_bits is RANKS


def test_an_analysis_of_bits_predicts_ranks_alone_as_one_without(
    analysis: tensorize.Analysis, model: nn.Module, batches: list[Tensor]
) -> None:
    alone = tensorize.analyze(model, calibration=batches).plan(0.5)
    both = analysis.plan(0.5, precision=None)
    assert both.predicted.loss == pytest.approx(alone.predicted.loss, rel=1e-6)
    assert both.predicted.loss_interval == pytest.approx(alone.predicted.loss_interval, rel=1e-6)


# -------------------------------------------------------------------------------- the trials


def test_without_precisions_there_is_no_family() -> None:
    batches = [torch.randn(16, 12) for _ in range(4)]
    found = tensorize.analyze(nn.Linear(12, 8), calibration=batches).program.predictor
    assert found is not None
    assert found.worth == {}


def test_plans_of_all_that_is_allowed_are_tried_as_they_come_and_refitted(
    analysis: tensorize.Analysis,
) -> None:
    found = analysis.program.predictor
    assert found is not None
    assert set(found.worth) == {BITS, BOTH}
    assert all(0.2 < worth < 5 for worth in found.worth.values())
    for refine, losses in ((None, MIXED_LOSSES), ("refit", REFIT_LOSSES)):
        near = [
            any(0.5 * lost < each.raw <= lost for each in found.rounded if each.refine == refine)
            for lost in losses
        ]
        assert sum(near) >= len(near) - 1  # all of the weights may not lose so much


def rise(model: nn.Module, small: nn.Module, given: list[Tensor], known: list[Tensor]) -> float:
    """The rise over batches, directly, of the loss that is preserved on those that are known."""
    batches = [batch_of(each) for each in given]
    loss = PreservedLoss.fit(model, [batch_of(each) for each in known], None)
    with torch.no_grad():
        parts = [loss.rise(call(model, b), call(small, b), b, model) for b in batches]
    return sum(part for part, _ in parts) / sum(rows for _, rows in parts)


def summed(plan: Plan) -> float:
    return sum(site.predicted_loss for site in plan.sites)


def test_a_trial_measures_what_its_plan_does_once_it_is_carried_out(
    analysis: tensorize.Analysis, model: nn.Module, batches: list[Tensor]
) -> None:
    """Products of integers with rounded inputs among it."""
    found = analysis.program.predictor
    assert found is not None
    program = replace(analysis.program, predictor=Predictor((), "", True, worth=found.worth))
    checked = 0
    for lost in MIXED_LOSSES[:3]:
        made = Allocate(Budget(loss=lost), precision="auto", fingerprint=analysis.fingerprint)
        plan = made.run(program).plan
        tried = next(t for t in found.rounded if t.raw == pytest.approx(summed(plan), rel=1e-9))
        with_analysis = replace(analysis.plan(0.5, refine=None), **vars(plan))
        small = tensorize.apply(model, with_analysis, refine=None)
        found_now = rise(model, small, split(tuple(batches))[1], batches)
        assert found_now == pytest.approx(tried.measured, rel=1e-3)
        assert any(site.spec is not None and site.spec.precision for site in plan.sites)
        checked += 1
    assert checked == 3


@pytest.mark.parametrize("share", [0.12, 0.2, 0.3])
def test_predictions_with_bits_hold_on_new_data(
    analysis: tensorize.Analysis, model: nn.Module, batches: list[Tensor], share: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    new = [torch.randn(256, 48, generator=generator)]
    plan = analysis.plan(share, refine=None)
    assert plan.predicted.loss_interval is not None
    low, high = plan.predicted.loss_interval
    assert low < rise(model, tensorize.apply(model, plan), new, batches) < high


def test_the_prediction_is_of_the_sum_that_the_plan_says(analysis: tensorize.Analysis) -> None:
    plan = analysis.plan(0.2, refine=None)
    assert analysis.program.predictor is not None
    expected, _ = analysis.program.predictor.with_bits.predict(summed(plan))
    assert plan.predicted.loss == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------------- what is said


def test_a_curve_says_what_ranks_alone_give_at_as_many_bytes(analysis: tensorize.Analysis) -> None:
    curve = analysis.curve([0.2, 0.5])
    assert "alone" in str(curve)
    for point in curve:
        alone = analysis.plan(Budget(bytes=point.budget), precision=None).predicted
        assert point.ranks_alone == alone.loss
        assert point.bytes <= point.budget * analysis.plan(0.5).dense.bytes
        assert point.loss is not None
        assert alone.loss is not None
        assert point.loss < alone.loss
    (said,) = (note for note in analysis.plan(0.2).notes if "ranks alone" in note)
    assert f"{curve[0].ranks_alone:.3g}" in said
