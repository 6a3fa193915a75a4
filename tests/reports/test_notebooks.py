"""What notebooks show: pages, pictures and tables that stand by themselves."""

from __future__ import annotations

import base64
import html
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tensorize
from tensorize.base.errors import TensorizeError
from tensorize.reports import page
from tensorize.reports.curve import Curve
from tests.models import CASES
from tests.reports.made_reports import DEVIL, bert_plans, make_report, rank_plan


def svg_in(shown: str) -> str:
    found = re.search(r"data:image/svg\+xml;base64,([^\"]+)", shown)
    assert found is not None
    return base64.b64decode(found[1]).decode()


def test_a_report_is_its_page_in_a_frame() -> None:
    report = make_report([rank_plan(DEVIL, "linear", 64, 64, 8, 0.1)])
    shown = report._repr_html_()
    found = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', shown)
    assert found is not None
    assert html.unescape(found[1]) == page.render(report)


def test_a_curve_is_a_table_and_a_picture_with_the_model_on_it(tmp_path: Path) -> None:
    report = make_report(bert_plans())
    assert report.curve is not None
    picture = report.plot()
    drawn = ElementTree.fromstring(str(picture))
    assert drawn.tag.endswith("svg")
    assert "this model keeps" in drawn.attrib["aria-label"]
    drawable = [point for point in report.curve if 0 < point.quality < math.inf]
    assert str(picture).count('class="dot"') == len(drawable) > 3
    picture.save(tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text() == str(picture)
    assert len(repr(picture)) < 100
    shown = report.curve._repr_html_()
    assert shown.count("<tr>") == len(report.curve) + 1
    assert "this model" not in svg_in(shown)
    assert svg_in(picture._repr_html_()) == str(picture)
    assert "<style" not in shown  # it would be one of the whole notebook


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(TensorizeError, match="no curve"):
        make_report(bert_plans(), curve=False).plot()
    empty = Curve((), "frobenius")
    with pytest.raises(TensorizeError, match="no point"):
        empty.picture()
    assert "<table>" in empty._repr_html_()


@pytest.fixture(scope="module")
def small() -> Any:
    case = CASES["llama"]
    return tensorize.compile(case.model(), 0.5, example_inputs=case.batch())


def test_plans_and_kernels_are_text_that_is_escaped(small: Any) -> None:
    plan = tensorize.report(small).plan
    shown = plan._repr_html_()
    assert shown.count("<tr>") == len(plan.sites) + 1
    assert ElementTree.fromstring(f"<div>{shown}</div>").tag == "div"
    for kernel in tensorize.kernels(small).values():
        assert html.unescape(kernel._repr_html_()).find(str(kernel)) > 0


def test_graphs_are_their_picture(small: Any) -> None:
    shown = tensorize.graphs(small, CASES["llama"].batch())._repr_html_()
    assert ElementTree.fromstring(svg_in(shown)).tag.endswith("svg")


def test_an_evaluation_is_its_page(small: Any) -> None:
    case = CASES["llama"]
    found = tensorize.evaluate(small, case.model(), [case.batch()], time=False)
    assert found._repr_html_().startswith("<iframe srcdoc=")
