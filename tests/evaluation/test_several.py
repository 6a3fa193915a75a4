"""Evaluation of several models and budgets: the table, JSON and page."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tensorize
from tensorize.base.errors import CaptureError, TensorizeError
from tensorize.evaluation import page
from tests.evaluation.measured_models import llama, measured, padded
from tests.hub.compressed_models import tokenizer
from tests.models import CASES
from tests.reports.browser import CHROMIUM, browse
from tests.training.healed_models import decoder, texts, values

BUDGETS = (0.5, 0.7, 0.9)


# ----------------------------------------------------------------------------------- several models


@pytest.fixture(scope="module")
def three() -> tensorize.Evaluation:
    torch.manual_seed(0)
    dense = decoder("llama")
    return tensorize.evaluate(
        list(BUDGETS), dense, padded(), calibration=texts(3, seed=5), tokenizer=tokenizer()
    )


def test_budgets_are_compressed_to(three: tensorize.Evaluation) -> None:
    assert [f.name for f in three.models] == ["50.0 % kept", "70.0 % kept", "90.0 % kept"]
    for figures, budget in zip(three.models, BUDGETS, strict=True):
        assert 0.8 * budget < three.share(figures) <= budget
    distances = [f.quality.distance for f in three.models]
    assert distances == sorted(distances, reverse=True)
    with pytest.raises(KeyError, match=r"none of 'dense', '50\.0 % kept'"):
        three["0.5"]


def test_models_and_budgets_in_one_call_and_nothing_is_changed() -> None:
    dense, small = llama()
    small.train()
    before, state = [values(m) for m in (dense, small)], torch.get_rng_state()
    several = [small, small, tensorize.Budget(params=0.8)]
    found = measured(several, dense, padded(), calibration=texts(3, seed=5))
    names = [f.name for f in found.models]
    assert names[0].endswith("kept")
    assert names[1] == f"{names[0]} again"
    assert names[2] == "params=0.8"
    assert found.models[0].quality == found.models[1].quality
    assert small.training
    assert torch.equal(torch.get_rng_state(), state)
    for model, was in zip((dense, small), before, strict=True):
        assert all(torch.equal(v, was[n]) for n, v in model.state_dict().items())
    with pytest.raises(CaptureError, match="no model to evaluate"):
        measured([], dense, padded())


def test_ranks_and_spectra_are_those_of_the_weights(three: tensorize.Evaluation) -> None:
    dense = decoder("llama")
    small = tensorize.compile(dense, BUDGETS[0], calibration=texts(3, seed=5))
    sites = tensorize.report(small).sites
    assert [(w.name, w.ranks) for w in three.models[0].weights] == [
        (s.name, s.ranks) for s in sites
    ]
    spectrum = next(s for s in three.spectra if s.name.endswith("0.mlp.up_proj.weight"))
    want = torch.linalg.svdvals(dense.get_parameter(spectrum.name).detach())
    for index, value in spectrum.values:
        assert value == pytest.approx(float(want[index - 1] / want[0]), rel=1e-3)
    assert spectrum.values[0][0] == 1
    assert spectrum.values[-1][0] == len(want)


# ---------------------------------------------------------------------------------- how it is shown


def test_the_table_is_at_most_100_wide(three: tensorize.Evaluation) -> None:
    text = str(three)
    assert max(map(len, text.splitlines())) <= 100
    head = next(line for line in text.splitlines() if line.startswith("model"))
    for title in ("kept", "bytes", "perplexity", "distance", "worst", "top-1", "top-5", "latency"):
        assert title in head
    assert "accuracy" not in head
    for figures in (three.dense, *three.models):
        assert any(line.startswith(figures.name) for line in text.splitlines())
    assert "up to the token that is furthest off" in text
    assert "after: " in text


def test_json_is_strict(three: tensorize.Evaluation) -> None:
    data = json.loads(json.dumps(three.to_dict(), allow_nan=False))
    assert data["models"][1]["share"] == three.share(three.models[1])
    assert data["dense"]["quality"]["perplexity"] == three.dense.quality.perplexity
    assert data["models"][0]["quality"]["worst"]["row"] == three.models[0].quality.worst.row


class _Page(html.parser.HTMLParser):
    """The texts of a page, its elements, and everything that it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.loaded, self.open = "", [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


PEERS = {"SVD": {0.5: 3.0, 0.7: 1.5, 0.9: 0.2}, "<b>ASVD</b>": {0.5: 2.5, 0.9: 0.1}}


def test_the_page_needs_nothing_else(three: tensorize.Evaluation, tmp_path: Path) -> None:
    three.to_html(tmp_path / "page.html", peers=PEERS)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown_page = _Page(source)
    assert not shown_page.loaded
    assert "script" not in shown_page.tags
    assert "nan" not in re.sub(r"[^0-9a-z. ]", " ", source).split()
    shown = (
        "What you gain", "What you lose", "Perplexity", "Worst token", "SVD", "<b>ASVD</b>",
        "Ranks by layer", "Spectra", "model.layers.*.mlp.up_proj",
    )  # fmt: skip
    for expected in shown:
        assert expected in shown_page.text
    for figures in three.models:
        assert figures.name in shown_page.text
    with pytest.raises(TensorizeError, match="does not exist"):
        three.to_html(tmp_path / "missing" / "page.html")


def test_of_every_bar_longer_is_better(three: tensorize.Evaluation) -> None:
    """Smaller budgets gain more memory, and lose more of everything else."""
    rows = {row.title: row for _, _, found in page._groups(three) for row in found}
    for title, longest_first in (("Memory", True), ("Parameters", True), ("KL to dense", False)):
        parts = [cell.part for cell in rows[title].cells]
        assert parts == sorted(parts, reverse=longest_first)
        assert all(0 <= part <= 1 for part in parts)
    assert rows["Memory"].cells[0].part == 1  # the smallest of all
    assert [title for title, row in rows.items() if row.cells[0].part is None] == ["Worst token"]


def test_what_got_slower_is_no_gain(three: tensorize.Evaluation) -> None:
    dense = replace(three.dense, latency=1.0, throughput=100.0)
    times = ((0.5, 200.0), (1.02, 98.0), (1.5, 60.0))
    models = [
        replace(figures, latency=latency, throughput=rate)
        for figures, (latency, rate) in zip(three.models, times, strict=True)
    ]
    timed = replace(three, dense=dense, models=tuple(models))
    rows = {row.title: row for _, _, found in page._groups(timed) for row in found}
    for title in ("Latency", "Throughput"):
        assert [cell.worse for cell in rows[title].cells] == [False, False, True]
        assert "slower" in rows[title].cells[2].beside


def test_the_dense_model_is_in_the_chart(three: tensorize.Evaluation) -> None:
    chart = page._chart(three, {})
    assert chart is not None
    assert chart["dense"] > max(x for x, *_ in chart["dots"])
    assert chart["x_ticks"][-1][1] == "100 %"


def test_pages_of_other_kinds(tmp_path: Path) -> None:
    dense = CASES["mlp"].model()
    x, y = torch.randn(64, 48), torch.randint(0, 32, (64,))
    found = measured([0.6, 0.9], dense, [x], labels=[y])
    found.to_html(tmp_path / "classes.html")
    text = _Page((tmp_path / "classes.html").read_text(encoding="utf-8")).text
    assert "Accuracy" in text
    assert "Classes" in text
    assert "Perplexity" not in text
    exact = measured({"itself": dense}, dense, [x])
    exact.to_html(tmp_path / "exact.html")  # nothing fits a logarithmic axis
    assert "by memory kept" not in (tmp_path / "exact.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_three_budgets_are_answered_without_scrolling(
    three: tensorize.Evaluation, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    three.to_html(file, peers=PEERS)
    measure = """<script>
    document.documentElement.dataset.bottom = Math.round(
      document.querySelector(".top").getBoundingClientRect().bottom);
    document.documentElement.dataset.wide = document.documentElement.scrollWidth;
    </script>"""
    source = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"<meta http-equiv=.Content-Security[^>]*>", "", source) + measure)
    dom = browse(tmp_path, file, "--dump-dom", "--window-size=1280,800").stdout
    found = {name: int(value) for name, value in re.findall(r'data-(bottom|wide)="(\d+)"', dom)}
    assert found["bottom"] <= 800
    assert found["wide"] <= 1280
