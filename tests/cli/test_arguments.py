"""The command line: budgets and formats as text, documents, and wrong usage."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from tensorize.base.errors import BudgetError
from tensorize.cli import sources
from tensorize.cli.parse import parse_budget, parse_formats, parse_precision
from tensorize.cli.telling import USAGE
from tensorize.ir.budget import Budget
from tests.cli.commands import invoke


def test_budget_texts() -> None:
    assert parse_budget("0.3") == 0.3  # of the parameters, or of the bytes: as options say
    assert parse_budget("1") == 1.0
    assert parse_budget("params=0.3, error=0.05,bytes=2e6") == Budget(
        params=0.3, error=0.05, bytes=2_000_000
    )
    assert parse_budget("flops=1,loss=2") == Budget(flops=1.0, loss=2.0)
    for text in ("auto", "30%", "10MB"):
        assert parse_budget(f" {text} ") == text
    for text in ("much", "params=", "size=3", "params=0.1,params=0.2", "params=0.1;error=2", "="):
        with pytest.raises(typer.BadParameter):
            parse_budget(text)
    for text in ("0", "7", "nan", "params=-1", "params=1.5"):
        with pytest.raises(BudgetError):
            parse_budget(text)


def test_format_texts() -> None:
    assert parse_formats(None) is None
    assert parse_formats(["tt"]) == ["tt"]
    assert parse_formats(["tt,dense", "low_rank"]) == ["tt", "dense", "low_rank"]
    assert parse_formats(["*.up=tt, dense"]) == {"*.up": ["tt", "dense"]}
    with pytest.raises(typer.BadParameter):
        parse_formats(["*.up=tt", "dense"])


def test_documents_are_paragraphs_or_lines() -> None:
    assert sources.documents("a\nb\n \nc\n\n\n\nd\n") == ["a\nb", "c", "d"]
    assert sources.documents("a\n b\nc") == ["a", "b", "c"]
    assert sources.documents(" \n\n") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "clinet:make"],
        ["compile", "clinet:make", "--out", "o", "--budget", "much"],
        ["compile", "clinet:make", "--out", "o", "--metric", "taste"],
        ["compile", "clinet:make", "--out", "o", "--batch-size", "0"],
        ["compile", "clinet:make", "--out", "o", "--html", "nowhere/page.html"],
        ["compile", "--out", "o"],
        ["analyze", "clinet:make", "--budgets", "0.1,some"],
        ["report"],
        ["polish"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == USAGE, result.output
    assert "Traceback" not in result.output
    assert not Path("o").exists()


def test_precisions_as_text() -> None:
    assert parse_precision(None) is None
    assert parse_precision(["auto"]) == "auto"
    assert parse_precision(["int8, int4", "float32"]) == ["int8", "int4", "float32"]
