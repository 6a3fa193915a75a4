"""The report as one page that needs nothing else."""

from __future__ import annotations

import html.parser
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tensorize.base.errors import TensorizeError
from tensorize.reports.curve import Curve
from tensorize.reports.data import CurvePoint, Stage
from tensorize.reports.report import Report
from tests.reports.browser import CHROMIUM, browse
from tests.reports.made_reports import DEVIL, bert_plans, make_report, rank_plan

# --------------------------------------------------------------------------------------------- page

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
        assert page.text.partition("Plan as JSON")[0].count(site.reason) == 1
    for text in (*report.notes, *(stage.summary for stage in report.history)):
        assert text in page.text
    for name, value in report.environment:
        assert name in page.text
        assert value in page.text
    assert "10.2 M" in page.text
    assert "15.3 % of 67.1 M" in page.text
    assert report.plan.to_json() in page.text


def test_what_was_measured_stands_beside_what_was_predicted(report: Report, tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", Page(write(report, tmp_path)).text)
    assert "0.0312predicted 0.0334measured" in text
    assert "0.173predicted 0.168measured" in text


def test_times_are_among_the_cards(report: Report, tmp_path: Path) -> None:
    before, after = report.totals.before, report.totals.after
    report = replace(
        report,
        totals=replace(
            report.totals,
            before=replace(before, latency=(500.0, 900.0, 9000.0)),
            after=replace(after, latency=(500.0, 600.0, 3000.0)),
        ),
    )
    text = re.sub(r"\s+", " ", Page(write(report, tmp_path)).text)
    assert "1.0 to 3.0×" in text
    assert "1 row: 500 → 500 µs" in text
    assert "256 rows: 9.00 → 3.00 ms" in text


def test_sites_are_folded_by_layer(report: Report, tmp_path: Path) -> None:
    page = Page(write(make_report(bert_plans(32)), tmp_path))
    kinds = [attributes for tag, attributes in page.elements if tag == "th"]
    rows = [each for each in kinds if each.get("scope") == "row"]
    assert len(rows) == 3 + 6  # two tables, the pooler, and six weights a layer
    cells = [a for tag, a in page.elements if tag == "td" and "title" in a and "heat" in a["class"]]
    assert len(cells) == 3 + 6 * 32
    assert any("layer.31." in cell["title"] for cell in cells)


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
    assert page.text.count(DEVIL.removesuffix(".weight")) >= 5


def test_page_of_many_sites_without_data(tmp_path: Path) -> None:
    report = make_report(bert_plans(24), loss=False)
    page = Page(write(report, tmp_path))
    assert "147 sites, one by one" in page.text
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


# ------------------------------------------------------------------------------------------ browser


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
