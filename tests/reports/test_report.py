"""The report: text of at most 100 columns, exact JSON, a plot."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tensorize
from tensorize.base.errors import TensorizeError
from tensorize.ir.plan import Totals
from tensorize.reports.curve import Curve
from tensorize.reports.data import ReportTotals
from tensorize.reports.report import Report
from tests.reports.made_reports import DEVIL, bert_plans, make_report, rank_plan

# --------------------------------------------------------------------------------------------- text

GOLDEN = """\
kept: 51.9 % of the parameters, 51.9 % of the bytes (992 kB of 1.91 MB)
lost: measured to lose 0.0334 in the loss
next: tensorize.report(model) has every weight, tensorize.evaluate measures

tensorize: 2 sites, 1 factorized, 1 dense; budget params ≤ 20 %. Errors are relative, of a site's
weight, in the metric loss: predicted, then measured.

site        kind    shape    format       parameters       error  actual  why
----------  ------  -------  -----------  ---------------  -----  ------  ---
fc1.weight  linear  512x512  low rank 32  262 K -> 32.8 K  0.081   0.079  [1]
fc2.weight  linear  10x512   dense        5.12 K               -       -  [2]

total         before   after   share
-----------  -------  ------  ------
parameters     477 K   248 K  51.9 %
bytes        1.91 MB  992 kB  51.9 %
FLOPs a row    535 K  75.8 K  14.2 %

predicted rise of the loss: 0.0312, 90 %: 0.0212 to 0.0453, metric loss; measured 0.0334
predicted error of the outputs: 0.173; measured 0.168
measured error of a site, at most: 0.0788 (fc1.weight)

why
  [1] least predicted loss for its parameters (λ = 3.1e-08 a parameter)
  [2] too small: low rank saves nothing below rank 2, and position rows are not redundant

notes
  * bert.encoder.layer.3.attention.self.key.weight: no tokens reached 11 of 768 inputs, their
      directions were weighed by the prior
  * LSTM layers are not looked at"""


def test_report_golden() -> None:
    plans = [
        rank_plan("fc1.weight", "linear", 512, 512, 32, 0.0812),
        rank_plan("fc2.weight", "linear", 10, 512, None, 0.0),
    ]
    assert str(make_report(plans, curve=False)) == GOLDEN


def test_its_repr_is_one_screen_that_begins_with_the_verdict(report: Report) -> None:
    lines = repr(report).splitlines()
    assert len(lines) < 24
    assert lines[0].startswith("kept: ")
    assert max(map(len, lines)) <= 100
    assert "print(report)" in lines[-1]


def test_report_has_one_row_a_site(report: Report) -> None:
    lines = str(report).split("\n")
    first = next(k for k, line in enumerate(lines) if line.startswith("site"))
    rows = lines[first + 2 : first + 2 + len(report.sites)]
    assert [re.search(r"\d+x\d+", row)[0] for row in rows] == [  # type: ignore[index]
        f"{site.shape[0]}x{site.shape[1]}" for site in report.sites
    ]
    assert len({row.split()[0] + row.split()[2] for row in rows}) == len(rows)
    assert not lines[first + 2 + len(rows)]


def test_report_without_data(report: Report) -> None:
    text = str(make_report(bert_plans(), loss=False))
    assert "predicted largest error of a site: 0.173, metric frobenius" in text
    assert "rise of the loss" not in text
    assert "rise of the loss" in str(report)


@pytest.mark.parametrize("name", ["a" * 400, ".".join(["part"] * 90), DEVIL, "a b " * 99, "weight"])
def test_text_never_exceeds_its_columns(name: str) -> None:
    odd = rank_plan(name, "linear+grouped_experts+embedding", 10**9, 10**9, 10**6, 1e-300)
    odd = replace(odd, reason="because_" * 60 + " and " * 60)
    report = make_report([odd, *bert_plans(2)])
    report = replace(report, notes=(name * 3, *report.notes))
    lines = f"{report}\n{report.curve}".split("\n")
    (wide,) = (line for line in lines if "1000000000x1000000000" in line)
    of_sites = lines.index(wide)  # the one table that holds figures which are not cut for it
    blank = [k for k, line in enumerate(lines) if not line]
    others = [
        *lines[: max(k for k in blank if k < of_sites)],
        *lines[min(k for k in blank if k > of_sites) :],
    ]
    assert max(map(len, others)) <= 100
    assert "low rank 1000000  1.00 E -> 2.00 P  1.0e-300  9.7e-301  [1]" in wide


def test_report_of_nothing() -> None:
    report = make_report([], curve=False)
    nothing = Totals(0, 0, 0)
    report = replace(report, notes=(), totals=ReportTotals(nothing, nothing))
    assert "no site was found" in str(report)
    assert report.totals.share.parameters == 1.0
    assert Report.from_dict(report.to_dict()) == report


def test_curve_is_a_sequence_that_prints(report: Report) -> None:
    curve = report.curve
    assert curve is not None
    assert len(curve) == 9
    assert curve[2] is list(curve)[2]
    assert curve[:2] == curve.points[:2]
    lines = str(curve).split("\n")
    assert lines[2].split() == [
        *["budget", "parameters", "bytes", "FLOPs", "a", "row", "error", "loss", "90", "%"],
        *["interval", "times"],
    ]
    assert lines[6].split()[:2] == ["10.0", "%"]


# --------------------------------------------------------------------------------------------- JSON


def test_json_round_trip_is_exact(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = Report.from_dict(json.loads(text))
    assert again == report
    assert hash(again) == hash(report)
    assert str(again) == str(report)


def test_json_keeps_what_json_has_no_number_for(report: Report) -> None:
    site = replace(report.sites[0], actual_error=math.inf)
    plan = replace(report.plan, sites=(replace(report.plan.sites[0], predicted_error=-math.inf),))
    odd = replace(report, plan=plan, sites=(site,), measured_loss=math.inf)
    again = Report.from_dict(json.loads(json.dumps(odd.to_dict(), allow_nan=False)))
    assert again == odd


def test_curve_round_trip(report: Report) -> None:
    curve = report.curve
    assert curve is not None
    assert Curve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


# --------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_everything_that_prints_goes_to_any_pipe(encoding: str, report: Report) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    spec = tensorize.TTSpec((8, 8), (8, 8), (4,))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    analysis = tensorize.analyze(model, example_inputs=(torch.ones(1, 64),), metric="frobenius")
    small = tensorize.apply(model, analysis.plan(0.5, formats="low_rank"))
    graphs = tensorize.graphs(small, (torch.ones(1, 64),))
    own = tensorize.report(small)
    plain_budget = replace(report.plan, budget="params=0.2")
    for each in (
        replace(report, plan=plain_budget, sites=own.sites, notes=()), report.curve, own,
        own.curve, own.plan, analysis, analysis.plan(0.5), analysis.curve(),
        tensorize.plan_contraction(spec), spec, small, small[0].weight, graphs.diff(),
        graphs.print_readable(), *tensorize.kernels(small).values(),
    ):  # fmt: skip
        print(each, file=pipe)
    pipe.flush()


@pytest.mark.parametrize("loss", [True, False])
def test_plot(tmp_path: Path, loss: bool) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    curve = make_report(bert_plans(1), loss=loss).curve
    assert curve is not None
    curve.plot(tmp_path / "curve.svg")
    assert "</svg>" in (tmp_path / "curve.svg").read_text(encoding="utf-8")


def test_plot_without_matplotlib(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.curve is not None
    with pytest.raises(TensorizeError, match="pip install matplotlib"):
        report.curve.plot(tmp_path / "curve.png")
    report.to_html(tmp_path / "report.html")
