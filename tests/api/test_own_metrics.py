"""Metrics of the caller's, predicted; and outputs that are distributions without saying so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import tensorize
from tensorize.base.errors import AnalysisError
from tensorize.passes.predict.metrics import predicted_metric


def mean_error(outputs: Tensor, batch: Any, dense: Tensor) -> Tensor:
    return 1000 * (outputs - dense).abs().mean()


def size(outputs: Tensor, batch: Tensor, dense: Tensor) -> float:
    return float(outputs.abs().mean())


class Classes(nn.Module):
    """A classifier that gives its prediction in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Any:
        logits = self.second(torch.tanh(2 * self.first(x)))
        forms = {
            "logits": lambda: {"logits": logits},
            "plain": lambda: logits,
            "log-probabilities": lambda: logits.log_softmax(-1),
            "probabilities": lambda: logits.softmax(-1),
            "both": lambda: (logits.log_softmax(-1), self.first(x)),
            "nearly": lambda: logits.softmax(-1) * 1.01,
            "one": lambda: logits[:, :1],
            "positions": lambda: logits.unflatten(0, (4, -1)).log_softmax(-1),
            "normal": lambda: Normal(logits, (0.1 * logits).exp()),
            "categorical": lambda: Categorical(logits=logits),
        }
        return forms[self.form]()


def rows(batches: int = 12, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(24, 24) * torch.linspace(0.2, 2, 24) for _ in range(batches)]


def classes(form: str) -> Classes:
    torch.manual_seed(0)
    return Classes(form)


def analysed(form: str, **options: Any) -> tensorize.Analysis:
    return tensorize.analyze(classes(form), calibration=rows(), **options)


def test_metrics_are_predicted_for_every_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)
    )
    metrics = {"MAE": mean_error, "size": size}
    analysis = tensorize.analyze(model, calibration=rows(16), metrics=metrics)
    fresh = torch.cat(rows(16, seed=2))
    assert "MAE" in str(analysis.curve([0.3, 0.6]))
    for budget in (0.3, 0.45, 0.6):
        plan = analysis.plan(budget)
        assert [metric.name for metric in plan.predicted.metrics] == ["MAE", "size"]
        predicted = plan.predicted.metric("MAE")
        assert predicted.dense == 0
        small = tensorize.apply(model, plan)
        low, high = predicted.interval
        with torch.no_grad():
            assert low <= float(mean_error(small(fresh), fresh, model(fresh))) <= high
        assert 0 < low < predicted.value < high < 2 * predicted.value
        assert "MAE" in str(plan)
        assert tensorize.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(AnalysisError, match="one of MAE, size"):
        plan.predicted.metric("RMSE")


def test_a_metric_is_interpolated_over_the_root_of_the_loss() -> None:
    trials = [(0.01, (2.0, 0.0)), (0.04, (3.0, 0.0))]
    half = predicted_metric("m", (1.0, 0.0), trials, 0.0025, (0.0025, 0.0025))
    assert half.value == pytest.approx(1.5)
    none = predicted_metric("m", (1.0, 0.1), trials, 0.0, (0.0, 0.0))
    assert none.value == 1.0
    assert none.interval == pytest.approx((1 - 0.1645, 1 + 0.1645))
    wide = predicted_metric("m", (1.0, 0.0), trials, 0.02, (0.005, 0.08))
    narrow = predicted_metric("m", (1.0, 0.0), trials, 0.02, (0.019, 0.021))
    assert wide.interval[1] > narrow.interval[1] > narrow.value == wide.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": {"m": lambda *_: float("nan")}}, r"metrics\['m'\] gave nan for batch"),
        ({"metrics": [mean_error]}, "no mapping from names to functions"),
        ({"metrics": {"m": size}, "metric": "input"}, "no metric= but 'loss'"),
        ({"metrics": {"m": size}, "calibration": None}, "pass calibration="),
        ({"loss_fn": "nats"}, '"logits" or "squared"'),
    ],
)
def test_what_is_wrong_with_metrics_is_said(options: dict, words: str) -> None:
    given = {"calibration": rows(4), **options}
    with pytest.raises(AnalysisError, match=words):
        tensorize.analyze(classes("plain"), **given)


@pytest.mark.parametrize("form", ["log-probabilities", "probabilities"])
def test_distributions_are_compared_as_such(form: str) -> None:
    """They lose what the logits of the same model lose."""
    wanted, found = analysed("logits"), analysed(form)
    assert found.unit == wanted.unit == "nats"
    assert any(f"output holds {form}" in note for note in found.notes)
    for budget in (0.4, 0.7):
        one, other = wanted.plan(budget), found.plan(budget)
        assert [site.ranks for site in one.sites] == [site.ranks for site in other.sites]
        assert other.predicted.loss == pytest.approx(one.predicted.loss, rel=1e-2)
    small = tensorize.apply(classes(form), found.plan(0.5))
    measured = tensorize.evaluate(small, classes(form), rows(2), time=False)
    assert measured.kind == "classes"
    squared = analysed(form, loss_fn="squared")
    assert squared.unit != "nats"
    assert not any("holds" in note for note in squared.notes)


@pytest.mark.parametrize("form", ["positions", "categorical"])
def test_distributions_of_other_shapes_are_known_as_well(form: str) -> None:
    """Log-probabilities of every position, as a ProteinMPNN gives them, and torch's own classes."""
    wanted, found = (analysed(each, refine=None) for each in ("logits", form))
    assert found.unit == "nats"
    one, other = (each.plan(0.5, refine=None).predicted.loss for each in (wanted, found))
    assert other == pytest.approx(one, rel=1e-2)


def test_parameters_of_a_distribution_are_asked_about() -> None:
    found = analysed("normal", refine=None)
    assert found.unit != "nats"
    assert any("parameters of a distribution (Normal)" in note for note in found.notes)
    told = analysed("normal", loss_fn="squared", refine=None)
    assert not any("distribution" in note for note in told.notes)

    def surprise(outputs: Normal, batch: Any) -> Tensor:
        return -outputs.log_prob(batch[:, :6]).mean()

    own = analysed("normal", loss_fn=surprise, refine=None)
    assert not any("distribution" in note for note in own.notes)


@pytest.mark.parametrize(
    ("beside", "asked"),
    [
        (lambda x: torch.arange(24) % 6, True),
        (lambda x: (torch.arange(24) % 6).masked_fill(x[:, 0] > 0, -100), True),
        (lambda x: torch.arange(24) % 7, False),  # not one of six
        (lambda x: torch.arange(20) % 6, False),  # not one a row
        (lambda x: torch.rand(24), False),
    ],
)
def test_classes_beside_plain_numbers_are_asked_about(beside: Any, asked: bool) -> None:
    data = [(x, beside(x)) for x in rows(4)]
    found = tensorize.analyze(classes("plain"), calibration=data, refine=None)
    assert found.unit != "nats"
    assert asked == any('loss_fn="logits"' in note for note in found.notes)
    known = tensorize.analyze(classes("probabilities"), calibration=data, refine=None)
    assert not any('loss_fn="logits"' in note for note in known.notes)


def test_plain_logits_are_told_to_be_some() -> None:
    assert analysed("plain").unit != "nats"
    told = analysed("plain", loss_fn="logits")
    assert told.unit == "nats"
    named = analysed("logits").plan(0.5).predicted.loss
    assert told.plan(0.5).predicted.loss == pytest.approx(named, rel=1e-3)
    small = tensorize.apply(classes("plain"), told.plan(0.5))
    assert tensorize.report(small).totals.share.parameters <= 0.5
    assert analysed("logits", loss_fn="squared").unit != "nats"
    with pytest.raises(AnalysisError, match="one entry a row"):
        analysed("one", loss_fn="logits")


def test_what_is_no_distribution_alone_is_asked_about() -> None:
    both = analysed("both")
    assert both.unit != "nats"
    assert any("output 0 holds log-probabilities, and other" in note for note in both.notes)
    nearly = analysed("nearly")
    assert nearly.unit != "nats"
    assert not any("holds" in note for note in nearly.notes)
