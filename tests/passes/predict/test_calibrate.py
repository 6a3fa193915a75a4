"""The prediction of the loss: what was measured comes out again, and between it nothing jumps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tensorize
from benchmarks.subjects import text
from examples.gpt import load_pretrained
from tensorize.capture.inputs import batch_of
from tensorize.ir.plan import NATS, OF_VARIANCE, REFIT, THE_CALLERS
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate.allocate import smallest_share
from tensorize.passes.observe.loss import PreservedLoss, split
from tensorize.passes.observe.outputs import call
from tensorize.passes.predict.calibrate import TRIAL_SHARES, refined_shares, trial_share
from tensorize.passes.predict.predictor import Predictor, Trial
from tensorize.passes.predict.trials import Reference, stand_ins, trial_plan
from tensorize.passes.rewrite.factorize import best_components, planned_cores
from tensorize.passes.stages import Learned
from tests.marks import slow, slow_but
from tests.models import CASES, MLP, Case

quick = settings(max_examples=100, deadline=None, derandomize=True)


def predictor(
    *points: tuple[float, float], spread: float = 0.0, held_out: bool = True
) -> Predictor:
    """From (sum of distortions, measured rise) of each trial."""
    trials = tuple(Trial(raw, measured, spread, math.sqrt(measured)) for raw, measured in points)
    return Predictor(trials, "nats", held_out)


@st.composite
def rising(draw: st.DrawFn) -> Predictor:
    """One to four trials whose measured rise grows with the sum of distortions."""
    count = draw(st.integers(1, 4))
    steps = st.lists(st.floats(0.01, 3.0), min_size=count, max_size=count)
    raws, measured = draw(steps), draw(steps)
    start, ratio = draw(st.floats(-8, 1)), draw(st.floats(-2, 2))
    points = [
        (math.exp(start + sum(raws[:k])), math.exp(start + ratio + sum(measured[:k])))
        for k in range(count)
    ]
    return predictor(*points, spread=draw(st.floats(0, 0.5)), held_out=draw(st.booleans()))


sums = st.floats(-20, 8).map(math.exp)


# -------------------------------------------------------------------------------- the predictor


@quick
@given(rising())
def test_measured_points_come_out_again(found: Predictor) -> None:
    for trial in found.trials:
        assert found.predict(trial.raw)[0] == pytest.approx(trial.measured, rel=1e-9)


@quick
@given(rising(), sums, sums)
def test_more_damage_is_never_predicted_to_cost_less(
    found: Predictor, one: float, two: float
) -> None:
    less, more = sorted((one, two))
    assert found.predict(less)[0] <= found.predict(more)[0] * (1 + 1e-12)


@quick
@given(rising(), sums)
def test_the_interval_holds_the_expected_value(found: Predictor, raw: float) -> None:
    expected, (low, high) = found.predict(raw)
    assert 0 < low < expected < high
    assert expected / low == pytest.approx(high / expected, rel=1e-9)


@quick
@given(rising(), st.floats(-15, 5).map(math.exp))
def test_the_inverse_is_the_largest_sum_within_a_loss(found: Predictor, loss: float) -> None:
    raw = found.inverse(loss)
    assert found.predict(raw)[0] <= loss
    assert found.predict(raw * (1 + 1e-9))[0] > loss * (1 - 1e-9)


@quick
@given(rising(), sums)
def test_the_inverse_inverts(found: Predictor, raw: float) -> None:
    assert found.inverse(found.predict(raw)[0]) == pytest.approx(raw, rel=1e-6)


def test_between_two_trials_the_ratio_is_interpolated_on_logarithmic_scales() -> None:
    found = predictor((0.01, 0.02), (1.0, 8.0))
    assert found.predict(0.1)[0] == pytest.approx(0.1 * math.sqrt(2 * 8))
    # Beyond them it stays as it was there.
    assert found.predict(0.001)[0] == pytest.approx(0.002)
    assert found.predict(10.0)[0] == pytest.approx(80.0)


def refined(*points: tuple[float, float]) -> Predictor:
    """One-shot trials that cost what the sum says, and a refit's."""
    sums = (1e-4, 1e2)
    plain = tuple(Trial(raw, raw, 0.0, raw**0.5) for raw in sums)
    refits = tuple(Trial(raw, measured, 0.0, raw**0.5, "refit") for raw, measured in points)
    return Predictor(plain + refits, "nats", True)


def test_what_a_refit_gains_goes_on_beyond_its_trials() -> None:
    """Each decade of damage gains another factor: .8 at .01, .64 at .1."""
    found = refined((0.01, 0.008), (0.1, 0.064))
    assert found.predict(0.01, "refit")[0] == pytest.approx(0.008)
    assert found.predict(1.0, "refit")[0] == pytest.approx(0.512)
    less = found.predict(0.001, "refit")[0] / 0.001
    assert 0.8 < less < 0.9, "of less damage it fades slowly"
    assert less < found.predict(0.0001, "refit")[0] / 0.0001 < 1.0


@pytest.mark.parametrize("gains", [(0.9, 0.01), (0.3, 0.9), (1.2, 1.5)])
def test_a_refit_that_gains_oddly_is_not_carried_on_too_far(gains: tuple[float, float]) -> None:
    found = refined((0.01, 0.01 * gains[0]), (0.1, 0.1 * gains[1]))
    rises = [found.predict(10.0**k, "refit")[0] for k in range(-6, 5)]
    outside = rises[:5], rises[5:]
    assert all(list(part) == sorted(part) for part in outside)
    assert rises[0] <= 1e-6 * max(1.0, gains[0]) * (1 + 1e-9)


def test_a_refit_of_more_damage_than_was_tried_is_less_certain() -> None:
    found = refined((0.01, 0.008), (0.1, 0.064))

    def half(raw: float) -> float:
        expected, (_, high) = found.predict(raw, "refit")
        return high / expected

    assert half(0.001) == pytest.approx(half(0.1))
    assert half(0.1) < half(1.0) < half(10.0)


def test_nothing_lost_is_nothing_risen() -> None:
    assert predictor((0.01, 0.02)).predict(0.0) == (0.0, (0.0, 0.0))
    assert predictor((0.01, 0.02)).output_error(0.0) == 0.0


def test_without_trials_the_sum_itself_is_expected_and_little_is_promised() -> None:
    found = predictor()
    assert found.predict(0.5) == (0.5, (0.0, 2.0))
    assert found.inverse(0.5) == pytest.approx(0.5)
    assert found.output_error(0.5) == 0.0


def width(found: Predictor, raw: float) -> float:
    expected, (_, high) = found.predict(raw)
    return high / expected


def test_the_interval_says_how_little_is_known() -> None:
    points = (0.01, 0.02), (1.0, 8.0)
    base = predictor(*points)
    assert width(predictor(*points, spread=0.3), 0.01) > width(base, 0.01)
    assert width(predictor(*points, held_out=False), 0.01) > width(base, 0.01)
    assert width(base, 0.1) > width(base, 0.01), "between two trials that disagree"
    assert width(base, 1e-4) > width(base, 0.01), "far from every trial"
    assert width(base, 1e2) > width(base, 1.0)
    # What the data do not say, alone: 13 %, one sigma.
    assert width(predictor((1.0, 1.0)), 1.0) == pytest.approx(math.exp(1.645 * 0.13))


def test_the_error_of_the_outputs_goes_with_the_root_of_the_loss() -> None:
    trials = (Trial(0.01, 0.02, 0.0, 0.1), Trial(1.0, 2.0, 0.0, 1.0))
    found = Predictor(trials, "nats", held_out=True)
    for trial in trials:
        assert found.output_error(trial.measured) == pytest.approx(trial.output_error)
    assert found.output_error(0.2) == pytest.approx(0.1 * math.sqrt(10))
    assert found.output_error(0.0002) == pytest.approx(0.01)


def test_measurements_out_of_order_do_not_confuse_the_error_of_the_outputs() -> None:
    """Noise: a larger sum may be measured to cost less."""
    trials = (Trial(0.01, 0.03, 0.0, 0.2), Trial(0.02, 0.02, 0.0, 0.1), Trial(1.0, 2.0, 0.0, 1.0))
    found = Predictor(trials, "nats", held_out=True)
    for trial in trials:
        assert found.output_error(trial.measured) == pytest.approx(trial.output_error)


# -------------------------------------------------------------------------------- the trial plans


def rise(dense: nn.Module, small: nn.Module, given: Sequence[Any], loss: PreservedLoss) -> float:
    """The rise of the preserved loss over batches, directly."""
    total, rows = 0.0, 0
    with torch.no_grad():
        for batch in map(batch_of, given):
            part, count = loss.rise(call(dense, batch), call(small, batch), batch, dense)
            total, rows = total + part, rows + count
    return total / rows


def calibration(case: Case, batches: int = 8) -> list[Any]:
    return [case.batch(seed) for seed in range(batches)]


@pytest.mark.parametrize(
    "name",
    slow_but(("mlp", "gpt"), ("mlp", "gpt", "gpt2", "bert", "vit", "mixtral")),
)
def test_trials_measure_what_their_plans_do_on_batches_held_out(name: str) -> None:
    case = CASES[name]
    model, given = case.model(), calibration(case)
    analysis = tensorize.analyze(model, calibration=given)
    found: Predictor = analysis.program.predictor
    assert found.held_out
    assert found.unit == ("relative squared error" if name in ("mlp", "bert") else "nats")
    plain = [trial for trial in found.trials if trial.refine is None]
    raws = [trial.raw for trial in plain]
    assert raws == sorted(raws)
    # Logarithms of probabilities in float32, at most some hundred roundings each: what is less
    # than these is measured in any order.
    plain = [trial for trial in plain if trial.measured > 3e-7]
    loss = PreservedLoss.fit(model, [batch_of(b) for b in given], None)
    checked = 0
    least = smallest_share(analysis.program)
    for share in TRIAL_SHARES:
        plan = analysis.plan(trial_share(least, share), refine=None)
        raw = sum(site.predicted_loss for site in plan.sites)
        trial = next((t for t in plain if t.raw == pytest.approx(raw, rel=1e-12)), None)
        if trial is None:
            continue  # its damage was below rounding: nothing to calibrate with
        small = tensorize.apply(model, plan)
        measured = rise(model, small, split(tuple(given))[1], loss)
        assert measured == pytest.approx(trial.measured, rel=1e-3, abs=3e-7)
        assert plan.predicted.loss == pytest.approx(trial.measured, rel=1e-9)
        assert plan.predicted.output_error == pytest.approx(trial.output_error, rel=1e-9)
        checked += 1
    assert checked == len(plain) > 1


@pytest.mark.parametrize(
    ("name", "refine"),
    [
        ("mlp", "refit"),
        ("gpt", "refit"),
        slow("bert", "refit"),
        ("mlp", "polish"),
        slow("gpt", "polish"),
        slow("bert", "polish"),
    ],
)
def test_what_refining_gains_is_measured_in_trials(name: str, refine: str) -> None:
    case = CASES[name]
    model, given = case.model(), calibration(case)
    analysis = tensorize.analyze(model, calibration=given, refine=refine)
    trials = [t for t in analysis.program.predictor.trials if t.refine == refine]
    often = refine == "polish" or name == "mlp"  # which has one output row a sample
    shares = (0.75, 0.5, 0.25) if often else (0.5, 0.25)
    few = bool(analysis.program.few) and refine == "refit"  # whose gain may be none
    assert len(trials) == (len(TRIAL_SHARES) if few else len(shares))
    loss = PreservedLoss.fit(model, [batch_of(b) for b in given], None)
    for share in shares:
        plan = analysis.plan(share, refine=refine)
        raw = sum(site.predicted_loss for site in plan.sites)
        trial = next(t for t in trials if t.raw == pytest.approx(raw, rel=1e-12))
        # Of those that roundings put in another order the mean is predicted.
        assert plan.predicted.loss == pytest.approx(trial.measured, rel=1e-9, abs=3e-7)
        # The trial saw three quarters of the data, the result all of them, these batches as well.
        measured = rise(model, tensorize.apply(model, plan), split(tuple(given))[1], loss)
        assert 0.1 * trial.measured < measured < 1.1 * trial.measured


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_something_is_held_out(batches: int) -> None:
    model = MLP()
    found = tensorize.analyze(model, calibration=[torch.randn(32, 48) for _ in range(batches)])
    assert found.program.predictor.held_out
    assert found.program.predictor.trials


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 32))
    model.train()
    before = copy.deepcopy(model.state_dict())
    data = [torch.randn(16, 32) for _ in range(4)]
    state = torch.get_rng_state()
    analysis = tensorize.analyze(model, calibration=data)
    assert analysis.program.predictor.trials
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def test_shares_that_are_not_feasible_are_those_of_what_can_be_saved() -> None:
    class Heavy(nn.Module):
        """Half of the parameters are no matmul's."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 48, bias=False)
            self.scale = nn.Parameter(torch.ones(48 * 48))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale.mean()

    analysis = tensorize.analyze(Heavy(), calibration=[torch.randn(32, 48) for _ in range(4)])
    found = analysis.program.predictor.trials
    least = smallest_share(analysis.program)
    assert 0.5 < least < 0.6
    shares = [0.9, 0.75, *(least + (1 - least) * share for share in (0.5, 0.25, 0.1))]
    losses = sorted({analysis.plan(share, refine=None).predicted.loss for share in shares})
    assert losses == pytest.approx(sorted(t.measured for t in found if t.refine is None))


@pytest.mark.parametrize("refine", ["refit", slow("polish")])
def test_a_small_part_of_a_model_is_predicted_and_refined_as_all_of_it(refine: str) -> None:
    model = nn.Sequential(
        nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 48)
    )
    data = [torch.randn(32, 48) for _ in range(8)]
    analysis = tensorize.analyze(model, calibration=data, include="4", refine=refine)
    plan = analysis.plan(0.95, refine=refine)  # less than 0.9 cannot be
    low, high = plan.predicted.loss_interval
    assert 0 < low < plan.predicted.loss < high
    small = tensorize.apply(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.parameters


def test_a_polish_that_beats_the_dense_model_is_predicted_to_lose_next_to_nothing() -> None:
    """A loss of the caller's may fall below the dense model's, and has no logarithm there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    data = [torch.randn(64, 64) for _ in range(8)]
    analysis = tensorize.analyze(
        model,
        calibration=data,
        loss_fn=lambda outputs, _: (outputs[:, 0] - 1).square().mean(),
        refine="polish",
    )
    plan = analysis.plan(0.5, refine="polish")
    plain = analysis.plan(0.5, refine=None).predicted.loss
    assert 0 <= plan.predicted.loss <= plain


def test_a_predictor_whose_plain_trials_lost_nothing_predicts_from_the_curves() -> None:
    found = Predictor((Trial(1.0, 0.5, 0.0, 0.1, "refit"),), "nats", True, ("refit",))
    assert found.predict(2.0, "refit")[0] == 2.0
    assert not found.pays("refit")


@pytest.mark.parametrize("metric", ["frobenius", "input"])
def test_without_a_loss_nothing_is_predicted(metric: str) -> None:
    data = [torch.randn(32, 48) for _ in range(4)]
    analysis = tensorize.analyze(MLP(), calibration=data, metric=metric)
    assert analysis.program.predictor is None
    assert analysis.plan(0.5).predicted.loss is None


def test_a_loss_of_the_caller_is_predicted_in_its_own_unit() -> None:
    model = MLP()
    data = [{"x": torch.randn(64, 48), "target": torch.randn(64, 32)} for _ in range(8)]

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.model(x)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["target"]).square().sum(-1).mean()

    dense = Trained()
    optimizer = torch.optim.Adam(dense.parameters(), 1e-2)
    for _ in range(40):
        for batch in data:
            optimizer.zero_grad()
            loss_fn(dense(**batch), batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    analysis = tensorize.analyze(dense, calibration=data, loss_fn=loss_fn)
    assert analysis.program.predictor.unit == "loss_fn"
    plan = analysis.plan(0.5, refine=None)
    small = tensorize.apply(dense, plan)
    with torch.no_grad():
        rises = [loss_fn(small(**b), b) - loss_fn(dense(**b), b) for b in split(tuple(data))[1]]
    # The machine's times have a say in the plan, so that it need not be the one that was tried.
    assert plan.predicted.loss == pytest.approx(float(torch.stack(rises).mean()), rel=2e-2)


def test_a_loss_without_gradients_is_not_predicted_to_be_nothing() -> None:
    """At the minimum of the caller's loss: the Fisher is zero, the loss of a rank is not."""
    model = MLP()
    data = [(torch.randn(64, 48),) for _ in range(4)]
    with torch.no_grad():
        targets = {id(batch): model(*batch) for batch in data}

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - targets[id(batch)]).square().sum(-1).mean()

    analysis = tensorize.analyze(model, calibration=data, loss_fn=loss_fn)
    plan = analysis.plan(0.5)
    assert plan.predicted.loss is None
    assert plan.predicted.output_error == max(site.predicted_error for site in plan.sites) > 0
    assert sum("no counted output depends on it" in note for note in plan.notes) == 3


def test_what_stands_for_weights_is_what_the_plan_makes_of_them() -> None:
    case = CASES["gpt"]
    model = case.model()
    analysis = tensorize.analyze(model, calibration=calibration(case, 4))
    plan = analysis.plan(0.4, refine=None)
    learned = analysis.program.to(Learned, model=model)
    weights = stand_ins(learned, plan.sites, planned_cores(learned, plan.sites))
    assert set(weights) == {site.name for site in plan.sites if site.spec is not None}
    dense = dict(tensorize.densify(tensorize.apply(model, plan)).named_parameters())
    for name, value in weights.items():
        torch.testing.assert_close(value.dense(), dense[name].detach(), rtol=1e-4, atol=1e-6)
        assert isinstance(next(s.spec for s in plan.sites if s.name == name), TTSpec)


def test_plans_tried_together_lose_what_each_loses_alone() -> None:
    case = CASES["llama"]
    model, batches = case.model(), calibration(case, 4)
    learned = tensorize.analyze(model, calibration=batches).program.to(Learned, model=model)
    plans = [trial_plan(learned, share) for share in (0.3, 0.2)]
    assert all(planned is not None for planned in plans)
    sites = [planned.plan.sites for planned in plans if planned is not None]
    known = best_components(learned, sites)
    assert {shared for _, shared in known} == {False, True}
    together = [stand_ins(learned, each, planned_cores(learned, each, known)) for each in sites]
    alone = [stand_ins(learned, each, planned_cores(learned, each)) for each in sites]
    given = tuple(map(batch_of, batches))
    reference = Reference(model, given, PreservedLoss.fit(model, given, None))
    found = reference.measure_each(together)
    assert found[0].rise != found[1].rise
    for one, weights in zip(found, alone, strict=True):
        assert one.rise == pytest.approx(reference.measure(weights).rise, rel=1e-4)


def test_refinements_are_tried_up_to_where_the_model_is_ruined() -> None:
    small = {0.9: 0.001, 0.75: 0.01, 0.5: 0.1, 0.25: 0.6, 0.1: 2.0}
    real = {0.9: 0.06, 0.75: 0.3, 0.5: 1.2, 0.25: 3.0, 0.1: 5.4}

    def shares(lost: dict[float, float], unit: str = NATS, **how: Any) -> list[float]:
        given = {"pooled": False, "few": False, "least": 0.0, **how}
        return list(refined_shares(REFIT, lost, unit, **given))

    assert shares(small) == [0.5, 0.25]
    assert shares(real) == [0.5]
    assert shares(real, few=True) == [0.9, 0.75, 0.5]
    assert shares(real, OF_VARIANCE, pooled=True) == [0.75, 0.5]
    assert shares(real, THE_CALLERS) == [0.5, 0.25], "nobody knows what ruins it"
    assert [shares(small, least=least) for least in (0.75, 0.5)] == [[0.5]] * 2
    assert shares(small, least=0.4) == [0.5, 0.25]
    assert shares(small, pooled=True, least=0.6) == [0.75, 0.5]


def test_a_compile_predicts_what_an_analysis_of_any_budget_does() -> None:
    """With fewer trials: those of refits far below the budget say nothing of it."""
    model, batches = MLP().eval(), [torch.randn(64, 48) for _ in range(8)]
    analysis = tensorize.analyze(model, calibration=batches)
    small = tensorize.compile(model, 0.6, calibration=batches, refine="refit")
    assert tensorize.report(small).plan.predicted == analysis.plan(0.6, refine="refit").predicted


# ------------------------------------------------------------------------------ trained weights


CONTEXT, LEARNT, UNSEEN = 128, 32, 64


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tensorize.Analysis]:
    """A GPT with trained weights, and what was learnt from some text."""
    model = load_pretrained().eval()
    calibration = text("validation", LEARNT, CONTEXT).split(2)
    return model, tensorize.analyze(model, calibration=list(calibration))


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit", [0.4, 0.6, tensorize.Budget(loss=0.02), tensorize.Budget(loss=0.1)], ids=str
)
def test_predictions_for_trained_weights_hold_on_other_text(
    trained: tuple[nn.Module, tensorize.Analysis], limit: float | tensorize.Budget
) -> None:
    """None of these is a trial; a limit on the predicted loss holds within the interval, too."""
    model, analysis = trained
    unseen = list(text("validation", LEARNT + UNSEEN, CONTEXT)[LEARNT:].split(8))
    loss = PreservedLoss.fit(model, [batch_of(part) for part in unseen], None)
    plan = analysis.plan(limit)
    assert plan.predicted.loss is not None
    assert plan.predicted.loss_interval is not None
    low, high = plan.predicted.loss_interval
    measured = rise(model, tensorize.apply(model, plan), unseen, loss)
    assert low < measured < high
    assert 0.7 * plan.predicted.loss < low < high < plan.predicted.loss / 0.7
    if isinstance(limit, tensorize.Budget):
        assert limit.loss is not None
        assert 0.9 * limit.loss < plan.predicted.loss <= limit.loss


def test_trials_that_measure_rounding_alone_give_a_finite_interval() -> None:
    """A model that loses nothing at any rank: its trials' ratios may be as far apart as any."""
    trials = (Trial(6e-18, 1.5e-8, 1e4, 1e-6), Trial(4e-13, 2e-8, 0.0, 1e-6))
    found = Predictor(trials, "nats", held_out=True)
    for raw in (1e-300, 1e-40, 1e-15, 1.0):
        expected, (low, high) = found.predict(raw)
        assert 0 <= low <= expected <= high < math.inf
