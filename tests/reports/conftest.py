"""A report of every kind of row."""

from __future__ import annotations

import pytest

from tensorize.reports.report import Report
from tests.reports.made_reports import bert_plans, make_report


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(bert_plans())
