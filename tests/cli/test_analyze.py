"""``tensorize analyze`` and ``tensorize report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tensorize
from tensorize.cli.telling import BUDGET, CAPTURE, CHECKPOINT
from tensorize.store.manifest import read_report
from tests.cli.commands import invoke


def test_analyze_prints_and_draws_the_curve() -> None:
    result = invoke("analyze", "clinet:make", "--budgets", "0.3,0.6", "--plot", "curve.svg")
    assert result.exit_code == 0, result.output
    assert "30.0 %" in result.stdout
    assert "60.0 %" in result.stdout
    assert "<svg" in Path("curve.svg").read_text()
    result = invoke("analyze", "clinet:make", "--json")
    data = json.loads(result.stdout)
    assert len(data["curve"]["points"]) > 3
    assert invoke("analyze", "clinet:make", "--budgets", "0.0001").exit_code == BUDGET
    assert invoke("analyze", "clinet:make", "--budgets", "2").exit_code == BUDGET


def test_a_plot_that_cannot_be_drawn_is_known_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("analyze", "clinet:make", "--plot", "curve.svg")
    assert result.exit_code == CAPTURE
    assert "pip install matplotlib" in result.stderr
    assert "loading" not in result.stderr
    assert "a module that talks" not in result.stderr
    result = invoke("analyze", "clinet:make")  # the way out: without a plot
    assert result.exit_code == 0
    assert "budget" in result.stdout


def test_report_reads_the_manifest_only() -> None:
    assert invoke("compile", "clinet:make", "--budget", "0.5", "--out", "small").exit_code == 0
    (weights,) = Path("small").glob("*.safetensors")
    weights.unlink()
    result = invoke("report", "small", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "up.weight" in result.stdout
    assert Path("page.html").is_file()
    result = invoke("report", "small", "--json")
    assert tensorize.Report.from_dict(json.loads(result.stdout)) == read_report("small")
    Path("small/tensorize.json").write_text("{")
    result = invoke("report", "small")
    assert result.exit_code == CHECKPOINT
    assert "not valid JSON" in result.stderr
    assert invoke("report", "nowhere").exit_code == CHECKPOINT
