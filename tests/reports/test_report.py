"""The report: text of at most 100 columns, exact JSON, one page that needs nothing else."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tensorize.base.errors import TensorizeError
from tensorize.ir.plan import (
    Plan,
    Prediction,
    RankPlan,
    Totals,
)
from tensorize.ir.spec import TTSpec
from tensorize.reports.curve import Curve
from tensorize.reports.data import (
    CurvePoint,
    ReportTotals,
    SiteReport,
    Stage,
)
from tensorize.reports.report import Report

DEVIL = "x.<script>alert('&amp;\"')</script>.weight"
GAIN = "least predicted loss for its parameters (λ = 3.1e-08 a parameter)"
SMALL = "too small: low rank saves nothing below rank 2, and position rows are not redundant"


def rank_plan(name: str, kind: str, m: int, n: int, rank: int | None, error: float) -> RankPlan:
    spec = None if rank is None else TTSpec.low_rank(m, n, rank)
    reason = SMALL if rank is None else GAIN
    return RankPlan(name, kind, (m, n), spec, error, error**2 / 40, reason)


def bert_plans(layers: int = 6) -> list[RankPlan]:
    top = "bert.embeddings."
    word = TTSpec((16, 36, 53), (8, 8, 12), (64, 96))
    plans = [
        RankPlan(
            top + "word_embeddings.weight",
            "embedding+linear",
            (30528, 768),
            word,
            0.2114,
            0.0061,
            "a probe found structure: three cores beat low rank at equal parameters",
        ),
        rank_plan(top + "position_embeddings.weight", "embedding", 512, 768, None, 0.0),
    ]
    for k in range(layers):
        layer = f"bert.encoder.layer.{k}."
        for j, part in enumerate(("query", "key", "value")):
            name = f"{layer}attention.self.{part}.weight"
            plans.append(
                rank_plan(name, "linear", 768, 768, 32 + 16 * (k % 3) + 8 * j, 0.08 + 0.011 * j)
            )
        name = f"{layer}attention.output.dense.weight"
        plans.append(rank_plan(name, "linear", 768, 768, 64, 0.12))
        name = f"{layer}intermediate.dense.weight"
        plans.append(rank_plan(name, "linear", 3072, 768, 96 + 8 * k, 0.1 + 0.01 * k))
        name = f"{layer}output.dense.weight"
        plans.append(rank_plan(name, "linear", 768, 3072, 104, 0.131))
    plans.append(rank_plan("bert.pooler.dense.weight", "linear", 768, 768, None, 0.0))
    return plans


def make_report(plans: list[RankPlan], *, loss: bool = True, curve: bool = True) -> Report:
    sites = tuple(
        SiteReport(
            name=plan.name,
            aliases=("cls.predictions.decoder.weight",) if "word" in plan.name else (),
            kind=plan.kind,
            shape=plan.shape,
            format=plan.format,
            ranks=plan.ranks,
            parameters_before=plan.parameters_before,
            parameters_after=plan.parameters_after,
            predicted_error=plan.predicted_error,
            actual_error=plan.predicted_error * 0.97,
            predicted_loss=plan.predicted_loss,
            reason=plan.reason,
        )
        for plan in plans
    )
    before = sum(site.parameters_before for site in sites) + 210_034
    after = sum(site.parameters_after for site in sites) + 210_034
    flops = 2 * sum(site.parameters_before for site in sites if site.kind == "linear")
    left = 2 * sum(site.parameters_after for site in sites if site.kind == "linear")
    totals = ReportTotals(
        Totals(before, 4 * before, flops),
        Totals(after, 4 * after, left),
    )
    predicted = Prediction(
        after, 4 * after, left, 0.1731, 0.0312 if loss else None, (0.0212, 0.0453) if loss else None
    )
    plan = Plan(
        sites=tuple(plans),
        budget="params ≤ 20 %",
        metric="loss" if loss else "frobenius",
        predicted=predicted,
        dense=Totals(before, 4 * before, flops),
        batch_sizes=(1, 16, 256),
        seed=0,
        fingerprint="9f6c2e",
        notes=("kept exact: 12 sites",),
    )
    points = tuple(
        CurvePoint(
            budget=b,
            parameters=round(b * before),
            bytes=round(4 * b * before),
            flops=round(b * flops),
            output_error=0.9 * math.exp(-5 * b) if b < 1 else 0.0,
            loss=None if not loss else (1.1 * math.exp(-17 * b**0.9) if b < 1 else 0.0),
            loss_interval=None
            if not loss
            else (0.7 * math.exp(-18 * b**0.9), 1.6 * math.exp(-15.5 * b**0.9)),
        )
        for b in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0)
    )
    return Report(
        plan=plan,
        sites=sites,
        totals=totals,
        curve=Curve(points, plan.metric) if curve else None,
        history=(
            Stage("sites", 2.31, f"{len(sites)} sites in 74 uses; 3 parameters tied"),
            Stage("statistics", 85.2, "second moments of inputs and gradients from 4096 tokens"),
            Stage("spectra", 12.9, "37 whitened SVDs, 1 TT-SVD"),
            Stage("allocate", 0.0413, "λ = 3.1e-08, duality gap 0.4 %"),
            Stage("factorize", 3.07, f"{len(sites) - 2} sites rewritten, 52.1 M parameters gone"),
            Stage("verify", 1.12, "outputs equal to the interpreter's to 3.1e-06"),
        ),
        notes=(
            "bert.encoder.layer.3.attention.self.key.weight: no tokens reached 11 of 768 inputs, "
            "their directions were weighed by the prior",
            "LSTM layers are not looked at",
        ),
        environment=(
            ("tensorize", "0.1.0"),
            ("torch", "2.13.0+cpu"),
            ("python", "3.11.7"),
            ("machine", "AMD EPYC 7B13, 2 cores, 16 GB"),
        ),
        measured_loss=0.0334 if loss else None,
        measured_error=0.168 if loss else None,
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(bert_plans())


# ------------------------------------------------------------------------------------------ text


GOLDEN = """\
tensorize: 2 sites, 1 factorized, 1 dense; budget params ≤ 20 %. Errors are relative, of a site's
weight, in the metric loss: predicted, then measured.

site        kind    shape    format       parameters      error  actual  why
──────────  ──────  ───────  ───────────  ──────────────  ─────  ──────  ───
fc1.weight  linear  512×512  low rank 32  262 K → 32.8 K  0.081   0.079  [1]
fc2.weight  linear  10×512   dense        5.12 K              –       –  [2]

total         before   after   share
───────────  ───────  ──────  ──────
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
  • bert.encoder.layer.3.attention.self.key.weight: no tokens reached 11 of 768 inputs, their
      directions were weighed by the prior
  • LSTM layers are not looked at"""


def test_report_golden() -> None:
    plans = [
        rank_plan("fc1.weight", "linear", 512, 512, 32, 0.0812),
        rank_plan("fc2.weight", "linear", 10, 512, None, 0.0),
    ]
    assert str(make_report(plans, curve=False)) == GOLDEN


def test_report_has_one_row_a_site(report: Report) -> None:
    lines = str(report).split("\n")
    first = next(k for k, line in enumerate(lines) if line.startswith("site"))
    rows = lines[first + 2 : first + 2 + len(report.sites)]
    assert [re.search(r"\d+×\d+", row)[0] for row in rows] == [  # type: ignore[index]
        f"{site.shape[0]}×{site.shape[1]}" for site in report.sites
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
    text = f"{report}\n{report.curve}"
    assert max(map(len, text.split("\n"))) <= 100


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


# ------------------------------------------------------------------------------------------ JSON


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


# ------------------------------------------------------------------------------------------ page

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Reads a page: its text, its elements, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.elements = "", [""], []
        self.feed(text)
        self.close()
        assert self.open == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(report: Report, directory: Path) -> str:
    path = directory / "report.html"
    report.to_html(path)
    assert [entry.name for entry in directory.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_page_shows_everything(report: Report, tmp_path: Path) -> None:
    page = Page(write(report, tmp_path))
    for site in report.sites:
        assert site.name in page.text
        assert site.reason in page.text
    for text in (*report.notes, *(stage.summary for stage in report.history)):
        assert text in page.text
    for name, value in report.environment:
        assert name in page.text
        assert value in page.text
    assert "10.2 M" in page.text
    assert "15.3 % of 67.1 M" in page.text
    assert report.plan.to_json() in page.text


def test_page_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    text = write(report, tmp_path)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)


def test_page_escapes_names(tmp_path: Path) -> None:
    plans = [*bert_plans(1), rank_plan(DEVIL, "linear", 64, 64, 4, 0.1)]
    report = make_report(plans)
    report = replace(report, notes=(DEVIL,), history=(Stage(DEVIL, 0.0, DEVIL),))
    page = Page(write(report, tmp_path))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.text.count(DEVIL) >= 5


def test_page_of_many_sites_without_data(tmp_path: Path) -> None:
    report = make_report(bert_plans(24), loss=False)
    page = Page(write(report, tmp_path))
    assert "87 further sites" in page.text
    assert "Predicted error by budget" in page.text
    assert all(site.name in page.text for site in report.sites)


def test_page_of_nothing(tmp_path: Path) -> None:
    report = make_report([], curve=False)
    report = replace(report, notes=(), history=(), environment=(), measured_loss=None)
    assert "0 of 0 sites" in Page(write(report, tmp_path)).text


@pytest.mark.parametrize(
    ("losses", "drawn"),
    [([0.0, 0.0], False), ([math.nan, math.inf], False), ([1e-200, 1e30], True), ([0.5], True)],
)
def test_curve_of_odd_values(report: Report, tmp_path: Path, losses: list[float], drawn: bool):
    points = tuple(
        CurvePoint(10, 40, 20, 0.1, loss, (0.0, math.inf), budget=0.1 * (k + 1))
        for k, loss in enumerate(losses)
    )
    report = replace(report, curve=Curve(points, "loss"))
    text = write(report, tmp_path)
    assert ('class="curve"' in text) is drawn
    assert "nan" not in "".join(re.findall(r'points="([^"]*)"', text))


def test_page_is_written_at_once(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TensorizeError, match="No space left on device"):
        report.to_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_page_needs_its_directory(report: Report, tmp_path: Path) -> None:
    with pytest.raises(TensorizeError, match="does not exist"):
        report.to_html(tmp_path / "missing" / "report.html")


# ------------------------------------------------------------------------------------------ plot


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


# --------------------------------------------------------------------------------------- browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def browse(directory: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a browser that may use neither the network nor the user's settings."""
    assert CHROMIUM is not None
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={directory / 'profile'}"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_page_in_a_browser(report: Report, tmp_path: Path, width: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    report.to_html(page)
    size = f"--window-size={width},1600"
    log = browse(tmp_path, page, f"--screenshot={picture}", size).stderr
    assert "CONSOLE" not in log
    with image.open(picture) as shot:
        assert shot.size == (width, 1600)
        pixels = shot.convert("RGB")
        for part in range(4):  # every quarter shows something
            crop = pixels.crop((0, 400 * part, width, 400 * part + 400))
            assert len(crop.getcolors(maxcolors=10**6)) > 50


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_sorts(report: Report, tmp_path: Path) -> None:
    click = """<script>
    const button = [...document.querySelectorAll("th button")].find(b => b.textContent == "After");
    button.click();
    document.documentElement.dataset.order = [...document.querySelectorAll(".sortable tbody tr")]
      .map(row => row.cells[6].dataset.v).join(" ");
    throw new Error("seen");
    </script>"""
    page = tmp_path / "report.html"
    report.to_html(page)
    page.write_text(page.read_text(encoding="utf-8") + click, encoding="utf-8")
    result = browse(tmp_path, page, "--dump-dom")
    assert "seen" in result.stderr  # an error on the page would have been noticed
    order = re.search(r'data-order="([\d ]+)"', result.stdout)
    assert order is not None
    values = [int(value) for value in order[1].split()]
    assert values == sorted(site.parameters_after for site in report.sites)
