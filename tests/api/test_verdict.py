"""The first call: what compile says of its result, and budgets that need no thought."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import tensorize
from examples import gpt
from tensorize.algebra.metric import Metric
from tensorize.algebra.quantise import grid
from tensorize.api.outcome import outlook_of
from tensorize.base import printer
from tensorize.ir.plan import NATS, OF_VARIANCE
from tensorize.ir.precision import INTEGERS, Precision
from tensorize.passes.observe.loss import split
from tensorize.reports.report import Report
from tensorize.reports.verdict import Nearest
from tests.models import CASES, MLP


def sharp_gpt() -> gpt.GPT:
    """Untrained, with large weights: sure of what it predicts, and so easily ruined."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(vocabulary=64, context=16, width=32, layers=1, heads=4)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def analysis() -> tensorize.Analysis:
    torch.manual_seed(0)
    batches = [torch.randint(0, 64, (4, 16)) for _ in range(4)]
    return tensorize.analyze(sharp_gpt(), calibration=batches, refine=None)


def says(small: Any) -> str:
    return " ".join(str(tensorize.report(small).verdict).split())


def mlp() -> tuple[MLP, list[Any]]:
    case = CASES["mlp"]
    return case.model(), [case.batch(seed) for seed in range(4)]


# ----------------------------------------------------------------------------------- the verdict


def test_a_ruined_model_is_called_so_with_budgets_that_do_not(
    analysis: tensorize.Analysis,
) -> None:
    plan = analysis.plan(0.1, refine=None)
    assert plan.predicted.loss is not None
    assert plan.predicted.loss > 1
    small = tensorize.apply(sharp_gpt(), plan)
    report = tensorize.report(small)
    assert report.verdict.ruined
    assert str(report).startswith("kept: ")
    assert says(small) in " ".join(str(report).split())
    assert [near.loss for near in report.outlook.nearest] == [0.1]  # for .01 it takes all
    for near in report.outlook.nearest:
        predicted = analysis.plan(near.share, refine=None).predicted
        assert predicted.loss is not None
        assert predicted.loss <= near.loss
        assert f"budget={near.share:g}" in says(small)
        # A plan may be 5 % larger so that no weight is slower than dense.
        smaller = analysis.plan(0.94 * near.share, refine=None).predicted
        assert smaller.loss is not None
        assert smaller.loss > near.loss
    for way in ("precision=", "tensorize.heal(", "perplexity from"):
        assert way in says(small)


@pytest.mark.slow
@pytest.mark.own_data
def test_the_trained_gpt_at_a_tenth_without_data_is_ruined() -> None:
    small = tensorize.compile(gpt.load_pretrained(), budget=0.1)
    assert tensorize.report(small).verdict.ruined
    for said in ("RUINED", "perplexity from", "budget=", "precision=", "tensorize.heal("):
        assert said in says(small)


def test_perplexity_is_that_of_the_text(analysis: tensorize.Analysis) -> None:
    model = sharp_gpt()
    ((held_out,),) = (batch.args for batch in split(analysis.calibration)[1])
    with torch.no_grad():
        logits = model(held_out).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    known = outlook_of(analysis.plan(0.5, refine=None), analysis).text_loss
    assert known == pytest.approx(float(wanted), rel=1e-5)


def test_bits_that_fit_are_told_by_their_size(analysis: tensorize.Analysis) -> None:
    batches = [batch.given for batch in analysis.calibration]
    for share, precision in ((0.15, "int2"), (0.22, "int4"), (0.35, "int8")):
        bits = outlook_of(analysis.plan(share, refine=None), analysis).bits
        assert bits is not None
        assert bits.precision == precision
        options = {"precision": precision, "formats": "dense", "refine": None}
        whole = tensorize.analyze(sharp_gpt(), calibration=batches, **options).plan(1.0)
        assert bits.share == whole.predicted.bytes / whole.dense.bytes


def test_bits_that_were_tried_are_the_fewest_that_lose_little(
    analysis: tensorize.Analysis,
) -> None:
    model, asked = sharp_gpt(), []

    def try_bits(precision: Precision) -> float:
        asked.append(precision.name)
        return {"int2": 3.0, "int3": 0.4, "int4": 0.09, "int8": 0.001}[precision.name]

    plan = analysis.plan(0.1, refine=None)
    bits = outlook_of(plan, analysis, try_bits).bits
    assert bits is not None
    assert (bits.precision, bits.loss, asked) == ("int4", 0.09, ["int2", "int3", "int4"])
    small = tensorize.apply(model, plan)
    verdict = tensorize.report(small).verdict
    tried = verdict.outlook.bits
    assert tried is not None
    assert tried.loss is not None
    assert f"{tried.precision} alone keeps" in says(small)
    assert f"of the bytes and loses {printer.number(tried.loss)}" in says(small)
    assert tried.loss == pytest.approx(rounded_by_hand(tried.precision, analysis), rel=1e-3)


def rounded_by_hand(precision: str, analysis: tensorize.Analysis) -> float:
    """KL of a model whose weights are all rounded to the nearest code, on the held-out batches."""
    dense, model = sharp_gpt(), sharp_gpt()
    kind = INTEGERS[precision]
    for site in analysis.program.free:
        weight = model.get_parameter(site.name)
        found = grid(weight.detach(), kind, Metric(1.0, None, None))
        weight.data = found.values(found.nearest(weight.detach()))
    kl = []
    with torch.no_grad():
        for batch in split(analysis.calibration)[1]:
            p, q = (each(*batch.args).logits.double().log_softmax(-1) for each in (dense, model))
            kl.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(kl).mean())


def test_a_good_model_is_not_called_ruined(analysis: tensorize.Analysis) -> None:
    outlook = outlook_of(analysis.plan(0.9, refine=None), analysis)
    assert outlook.unit == NATS
    assert outlook.nearest == ()
    assert outlook.bits is None


def test_other_outputs_are_told_in_shares_of_their_variance() -> None:
    model, batches = mlp()
    small = tensorize.compile(model, 0.5, calibration=batches)
    verdict = tensorize.report(small).verdict
    assert verdict.outlook.unit == OF_VARIANCE
    assert "of the outputs' variance" in says(small)
    limit = replace(verdict, measured=0.49), replace(verdict, measured=0.51)
    assert [each.ruined for each in limit] == [False, True]
    assert "measured" in str(limit[1])
    assert replace(verdict, measured=float("nan")).ruined


def test_without_data_the_verdict_says_that_nothing_is_known() -> None:
    small = tensorize.compile(mlp()[0], 0.5)
    assert tensorize.report(small).verdict.ruined is None
    assert "lost: not known" in says(small)
    assert "calibration=" in says(small)


def test_a_loss_of_the_callers_is_not_judged() -> None:
    model, batches = mlp()
    small = tensorize.compile(
        model, 0.3, calibration=batches, loss_fn=lambda out, batch: out.square().mean()
    )
    assert tensorize.report(small).verdict.ruined is None


def test_the_outlook_is_kept_with_the_report() -> None:
    model, batches = mlp()
    report = tensorize.report(tensorize.compile(model, 0.5, calibration=batches))
    outlook = replace(report.outlook, nearest=(Nearest(0.1, 0.4),), text_loss=1.5)
    report = replace(report, outlook=outlook)
    assert Report.from_dict(report.to_dict()) == report
    old = {name: value for name, value in report.to_dict().items() if name != "outlook"}
    assert Report.from_dict(old).verdict.ruined is None


# ----------------------------------------------------------------------------------- where it is


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "tensorize"):
        yield caplog


def test_on_a_terminal_it_is_three_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model, batches = mlp()
    tensorize.compile(model, 0.8, calibration=batches, progress=lambda *_: None)
    said = [line for line in capsys.readouterr().err.splitlines() if "roughly" not in line]
    assert [line.split(": ")[:2] for line in said] == [
        ["tensorize", word] for word in ("kept", "lost", "next")
    ]
    tensorize.compile(model, 0.5, calibration=batches, progress=False)
    assert "kept" not in capsys.readouterr().err


def test_elsewhere_it_is_logged(
    spoken: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batches = mlp()
    for budget, level in ((0.8, "INFO"), (0.05, "WARNING")):
        spoken.clear()
        small = tensorize.compile(model, budget, calibration=batches)
        found = [r for r in spoken.records if r.getMessage().startswith(("kept", "lost", "RUINED"))]
        assert [r.levelname for r in found] == [level, level], says(small)
    assert not capsys.readouterr().out


# ----------------------------------------------------------------------------- budgets as words


def test_auto_is_the_smallest_model_that_loses_next_to_nothing(
    analysis: tensorize.Analysis,
) -> None:
    plan = analysis.plan("auto", refine=None)
    assert plan == analysis.plan(tensorize.Budget(loss=0.02), refine=None)
    model, batches = mlp()
    plan = tensorize.analyze(model, calibration=batches).plan("auto")
    assert plan.budget == str(tensorize.Budget(loss=0.01))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, "weights alone"),
        ({"metric": "frobenius"}, "weights alone"),
        ({"calibration": [], "loss_fn": lambda out, batch: out.sum()}, "loss_fn"),
    ],
)
def test_auto_needs_a_loss_whose_unit_is_known(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(tensorize.BudgetError, match=cause) as caught:
        tensorize.compile(mlp()[0], "auto", **options)
    assert caught.value.way_out


def test_a_share_in_percent_is_a_share_of_the_bytes_where_bits_take_part() -> None:
    model, batches = mlp()
    analysis = tensorize.analyze(model, calibration=batches, precision="int8")
    assert analysis.plan("50%") == analysis.plan(0.5)
    assert analysis.plan("50%").budget == str(tensorize.Budget(stored=0.5))
    assert analysis.plan("50%", precision=None).budget == str(tensorize.Budget(params=0.5))


def test_compile_takes_one_budget() -> None:
    with pytest.raises(tensorize.BudgetError, match="several budgets"):
        tensorize.compile(mlp()[0], [0.1, 0.5])  # pyright: ignore[reportArgumentType]
