"""Predicted times: from a machine's figures, as constraints, and measured on this one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.cli import app
from tensorize.codegen.machine import rates as machine
from tensorize.ir.machine import GENERIC, Machine, matmul_time
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate import times as cost
from tests.models import CASES, MLP

LINEAR = Site("w", (512, 256), "float32", (Use("linear", "columns"),))
# One FLOP a nanosecond, one byte a nanosecond, a microsecond a call: times can be told by hand.
SIMPLE = Machine("simple", (1,), (("float32", (1e9,)), ("bfloat16", (2e9,))), 1e9, 1e-6)


def test_a_matmul_costs_a_call_and_the_larger_of_work_and_bytes() -> None:
    # 2 · 8 · 16 · 4 FLOPs take 1.024 µs, 4 · (8·16 + 16·4 + 8·4) bytes 0.896 µs.
    assert matmul_time(SIMPLE, 8, 16, 4, "float32") == pytest.approx(1 + 1.024)
    assert matmul_time(SIMPLE, 1, 16, 4, "float32") == pytest.approx(1 + 0.336)
    assert matmul_time(SIMPLE, 8, 16, 4, "bfloat16") == pytest.approx(1 + 0.512)
    assert matmul_time(SIMPLE, 8, 16, 4, "float64") == pytest.approx(1 + 2.048)


def test_rates_between_measured_rows_lie_between_them() -> None:
    several = replace(SIMPLE, rows=(1, 100), rates=(("float32", (1e9, 1e10)),), bandwidth=1e30)
    at = [matmul_time(several, rows, 1000, 1000, "float32") - 1 for rows in (1, 10, 100)]
    assert at[1] == pytest.approx(math.sqrt(10) * at[0], rel=1e-6)
    assert at[2] == pytest.approx(10 * at[0], rel=1e-6)


def test_low_rank_is_two_matmuls_and_a_train_its_tree() -> None:
    spec = TTSpec.low_rank(512, 256, 32)
    want = matmul_time(SIMPLE, 16, 256, 32, "float32")
    want += matmul_time(SIMPLE, 16, 32, 512, "float32")
    assert cost.spec_times(LINEAR, spec, (16,), SIMPLE)[0] == pytest.approx(want)
    train = cost.spec_times(LINEAR, TTSpec((32, 16), (16, 16), (8,)), (1, 16), SIMPLE)
    assert train[0] < train[1]
    assert train[0] > 2  # two calls at least


@pytest.mark.parametrize("kind", ["embedding", "lookup in a train", "whole"])
def test_every_use_has_a_time(kind: str) -> None:
    use = Use("lstm", "whole") if kind == "whole" else Use("embedding", "lookup")
    site = replace(LINEAR, uses=(use,))
    spec = TTSpec((32, 16), (16, 16), (8,)) if "train" in kind else TTSpec.low_rank(512, 256, 8)
    times = cost.spec_times(site, spec, (1, 64), SIMPLE)
    assert (times > 0).all()
    assert times[0] <= times[1]


# ----------------------------------------------------------------------------------- budgets


def test_a_limit_on_latency_holds_at_every_batch_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    analysis = tensorize.analyze(model, example_inputs=(torch.randn(2, 512),))
    plan = analysis.plan(tensorize.Budget(latency=0.5), batch_sizes=(16, 256))
    for got, dense in zip(plan.predicted.latency, plan.dense.latency, strict=True):
        assert got <= 0.5 * dense
    limit = math.ceil(plan.predicted.latency[1])
    absolute = analysis.plan(tensorize.Budget(latency=limit), batch_sizes=(16, 256))
    assert max(absolute.predicted.latency) <= limit


def test_latency_and_size_hold_together() -> None:
    case = CASES["llama"]
    analysis = tensorize.analyze(case.model(), example_inputs=case.batch())
    budget = tensorize.Budget(params=0.7, latency=0.999)
    wide = replace(analysis.program, machine=SIMPLE)
    plan = replace(analysis, program=wide).plan(budget, batch_sizes=(256,))
    assert plan.predicted.parameters <= 0.7 * plan.dense.parameters
    assert plan.predicted.latency[0] <= 0.999 * plan.dense.latency[0]
    assert plan.machine == "simple"


def test_an_infeasible_latency_names_one_that_is_feasible() -> None:
    analysis = tensorize.analyze(MLP(), example_inputs=CASES["mlp"].batch())
    with pytest.raises(BudgetError, match="latency") as error:
        analysis.plan(tensorize.Budget(latency=1), batch_sizes=(1,))
    need = int(str(error.value).partition("latency=")[2].partition(")")[0])
    assert analysis.plan(tensorize.Budget(latency=need), batch_sizes=(1,))


def test_the_report_shows_predicted_times() -> None:
    small = tensorize.compile(MLP(), 0.5, example_inputs=CASES["mlp"].batch())
    report = tensorize.report(small)
    assert "us at 256 rows, predicted" in str(report)
    assert len(report.totals.after.latency) == 3
    again = type(report).from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.totals == report.totals
    plan = report.plan
    assert tensorize.Plan.from_json(plan.to_json()) == plan


# ----------------------------------------------------------------------------------- measured


def test_calibrate_measures_this_machine_and_plans_are_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["calibrate", "--json"])
    assert result.exit_code == 0, result.output
    measured = machine.current()
    assert measured.name == machine.identity()
    assert json.loads(result.stdout)["bandwidth"] == measured.bandwidth
    for _, rates in measured.rates:
        assert all(1e8 < rate < 1e15 for rate in rates)
    assert 1e8 < measured.bandwidth < 1e13
    assert 1e-8 < measured.launch < 1e-3
    plan = tensorize.analyze(MLP(), example_inputs=CASES["mlp"].batch()).plan(0.5)
    assert plan.machine == measured.name


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": 1}'])
def test_a_damaged_file_is_as_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    machine.place().write_text(text)
    assert machine.current() == machine.known()


def test_a_machine_not_measured_has_the_figures_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = machine.known()
    assert "not calibrated" in found.name
    assert found.bandwidth == GENERIC.bandwidth
    monkeypatch.setattr(machine, "identity", lambda device="cpu": "NVIDIA H200")
    known: Any = dict(machine.known("cuda").rates)
    assert known["bfloat16"][0] > known["float32"][0]
    assert np.isfinite(machine.known("cuda").bandwidth)


def test_a_gpu_that_is_not_named_is_taken_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 108

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    named = machine.known("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    found = machine.known("cuda")
    assert "tensorize calibrate" in found.name
    assert found.rank_multiple == named.rank_multiple
    assert found.bandwidth == pytest.approx(named.bandwidth, rel=0.05)
    for (dtype, own), (other, wanted) in zip(found.rates, named.rates, strict=True):
        assert dtype == other
        assert own == pytest.approx(wanted, rel=0.05)
