"""Few data are said to be few: held out, wide intervals, notes, and nothing that rises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.ir.plan import OF_VARIANCE, RUINED
from tensorize.ir.sufficiency import Sufficiency
from tensorize.passes.observe.loss import split
from tensorize.passes.predict.predictor import NORMAL_90, Predictor, Trial, student_90
from tests.marks import slow_but


def mlp(width: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out)).eval()


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(32, 64, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": 4 * self.inner(x)}


def lost(small: nn.Module, model: nn.Module, new: Tensor) -> float:
    with torch.no_grad():
        want, got = model(new), small(new)
    if isinstance(want, dict):
        p, q = (z["logits"].log_softmax(-1) for z in (want, got))
        return float((p.exp() * (p - q)).sum(-1).mean())
    return float((got - want).square().sum() / (want - want.mean(0)).square().sum())


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "wide": (lambda: mlp(64, 128, 64), 64),
    "one output": (lambda: mlp(24, 64, 1), 24),
    "classes": (Classes, 32),
}


@pytest.mark.parametrize("name", slow_but(MODELS.keys() - {"classes"}, MODELS))
def test_what_is_lost_on_new_data_lies_in_the_interval(name: str) -> None:
    """Of one batch. Intervals are to hold nine of ten; plans of one draw are out together."""
    build, width = MODELS[name]
    inside = 0
    for rows in (4, 16, 64):
        torch.manual_seed(rows)
        model, given, new = build(), torch.randn(rows, width), torch.randn(2000, width)
        analysis = tensorize.analyze(model, calibration=[given], progress=False)
        assert analysis.program.predictor.held_out
        for point in analysis.curve([0.2, 0.4, 0.6, 0.8]).points:
            found = lost(tensorize.apply(model, analysis.plan(point.budget)), model, new)
            inside += point.loss_interval[0] <= found <= point.loss_interval[1]
    assert inside >= 10


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_predictions_never_rise_with_the_budget(name: str, rows: int) -> None:
    build, width = MODELS[name]
    torch.manual_seed(rows)
    analysis = tensorize.analyze(build(), calibration=[torch.randn(rows, width)], progress=False)
    losses = [point.loss for point in analysis.curve().points]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))


def test_where_nothing_can_be_held_out_the_interval_is_wide_and_a_note_says_why() -> None:
    torch.manual_seed(0)
    model, new = mlp(64, 128, 64), torch.randn(500, 64)
    analysis = tensorize.analyze(model, calibration=[torch.randn(1, 64)], progress=False)
    assert not analysis.program.predictor.held_out
    assert any("nothing was held out" in note for note in analysis.notes)
    plan = analysis.plan(0.3)
    low, high = plan.predicted.loss_interval
    assert low <= lost(tensorize.apply(model, plan), model, new) <= high
    assert high > 4 * plan.predicted.loss


def test_fewer_rows_than_columns_are_told_and_enough_are_not() -> None:
    def notes(rows: int) -> list[str]:
        torch.manual_seed(0)
        model = mlp(32, 48, 16)
        small = tensorize.compile(model, 0.5, calibration=[torch.randn(rows, 32)], progress=False)
        return [note for note in tensorize.report(small).notes if "few calibration data" in note]

    (note,) = notes(20)  # of which a quarter is held out
    assert "fewer rows than they have columns" in note
    assert "15 rows" in note
    assert "held out" in note
    assert notes(2000) == []


def test_the_report_says_how_far_the_data_suffice() -> None:
    def given(rows: int) -> tensorize.Report:
        torch.manual_seed(0)
        data = [torch.randn(rows, 32)]
        return tensorize.report(
            tensorize.compile(mlp(32, 48, 16), 0.5, calibration=data, refine=None, progress=False)
        )

    few, enough = given(20), given(2000)
    found = few.outlook.sufficiency
    assert found is not None
    assert (found.rows, found.outputs) == (pytest.approx(15 / 48), pytest.approx(5 / 32))
    assert found.weight == "2.weight"  # 16 x 48
    assert found.least == found.outputs
    assert "calibration data" in str(few)
    assert tensorize.Report.from_dict(few.to_dict()).outlook.sufficiency == found
    assert enough.outlook.sufficiency == Sufficiency()
    assert "100 % of what is enough" in str(enough)


class Atoms(nn.Module):
    """A sum over atoms, each known by its element alone."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = nn.Embedding(94, 32)
        self.inner = mlp(32, 64, 8)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.inner(self.elements(numbers)).sum(1)


@pytest.mark.parametrize("refine", [None, "refit"])
def test_elements_that_were_not_met_are_foreseen_by_those_met_once(
    refine: str | None, tmp_path: Any
) -> None:
    """Of crystals that hold any of 94 elements a few show some; of those that hold six, all."""

    def crystals(number: int, elements: int, seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return [torch.randint(elements, (8, 6), generator=draw) for _ in range(number)]

    def analysed(number: int, elements: int) -> tensorize.Analysis:
        torch.manual_seed(0)
        data = crystals(number, elements, 1)
        return tensorize.analyze(
            Atoms(), calibration=data, refine=refine, cache_dir=tmp_path, progress=False
        )

    few, all_of_them = analysed(4, 94), analysed(4, 6)
    learnt, _ = split(tuple(crystals(4, 94, 1)))
    met = torch.cat(learnt).unique()
    new = torch.cat(crystals(200, 94, 2))
    unmet = 1 - float(torch.isin(new, met).double().mean())
    found = few.sufficiency
    assert found is not None
    assert found.table == "elements.weight"
    assert 1 - found.lookups == pytest.approx(unmet, abs=0.12)
    assert any("rows (words, elements) that none of these met" in note for note in few.notes)
    assert all_of_them.sufficiency is not None
    assert all_of_them.sufficiency.lookups == 1
    assert not any("elements" in note for note in all_of_them.notes)
    again = analysed(4, 94)  # as the cache has it
    assert again.sufficiency == found


def test_a_refit_is_tried_at_every_size_up_to_ruin_where_rows_are_few() -> None:
    def trials(rows: int) -> tuple[list[float], int]:
        """What plans lose that were tried without a refit, and how many were tried with one."""
        torch.manual_seed(0)
        given = [torch.randn(rows, 32)]
        analysis = tensorize.analyze(mlp(32, 48, 16), calibration=given, progress=False)
        found = analysis.program.predictor.trials
        plain = [trial.measured for trial in found if trial.refine is None]
        return plain, len(found) - len(plain)

    plain, refits = trials(24)
    ruined = sum(loss > RUINED[OF_VARIANCE] for loss in plain)
    assert 0 < ruined < len(plain)
    assert refits == len(plain) - ruined + 1
    assert trials(2000)[1] < len(plain) - 1


def test_a_kept_analysis_knows_that_nothing_was_held_out(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, given = mlp(64, 128, 64), [torch.randn(1, 64)]
    intervals = [
        tensorize.analyze(model, calibration=given, cache_dir=tmp_path, progress=False)
        .plan(0.3)
        .predicted.loss_interval
        for _ in range(2)
    ]
    assert intervals[0] == intervals[1]


# -------------------------------------------------------------------------------- the predictor


@pytest.mark.parametrize("seed", range(50))
def test_trials_that_scatter_predict_what_never_falls_with_damage(seed: int) -> None:
    draw = np.random.default_rng(seed)
    raws = np.exp(np.sort(draw.normal(size=5)))
    plain = [Trial(float(r), float(np.exp(draw.normal())), 0.1, 0.1) for r in raws]
    refit = [Trial(float(r), float(np.exp(draw.normal())), 0.1, 0.1, "refit") for r in raws[1:4]]
    found = Predictor((*plain, *refit), "nats", True, ("refit",))
    for refine in (None, "refit"):
        at = np.exp(np.linspace(-6, 6, 400))
        values = [found.predict(float(raw), refine)[0] for raw in at]
        assert all(b >= a * (1 - 1e-9) for a, b in pairwise(values))


def test_trials_out_of_order_both_predict_their_mean_and_less_surely() -> None:
    trials = [Trial(raw, measured, 0.0, 0.1) for raw, measured in ((1.0, 4.0), (2.0, 1.0))]
    found = Predictor(tuple(trials), "nats", True)
    for raw in (1.0, 2.0):
        value, (low, high) = found.predict(raw)
        assert value == pytest.approx(2.0)
        assert low < 1.0 < 4.0 < high


def test_students_distribution() -> None:
    known = {2: 2.920, 3: 2.353, 4: 2.132, 7: 1.895, 15: 1.753, 30: 1.697}
    for degrees, value in known.items():
        assert student_90(degrees) == pytest.approx(value, rel=0.04)
    assert student_90(10**6) == pytest.approx(NORMAL_90, rel=1e-5)
    assert 4.5 < student_90(1) < 6.4
