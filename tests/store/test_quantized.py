"""Models whose weights are integers of a few bits: plans, reports and artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.ir.plan import Plan
from tensorize.weight.install import factored
from tensorize.weight.whole_model import numbers
from tests.models import relative
from tests.store.saved_models import edit_manifest
from tests.weight.quantized_models import FORMS, IDS, NAMES, Form, compressed, net, plan_of

EACH = pytest.mark.parametrize("form", FORMS, ids=NAMES)


@EACH
def test_what_is_saved_is_loaded_to_the_bit(form: Form, tmp_path: Path) -> None:
    small = compressed(form)
    tensorize.save(small, tmp_path)
    for again in (tensorize.load(tmp_path, model=net()), tensorize.load(tmp_path, model=small)):
        assert torch.equal(again(IDS), small(IDS))
        assert again.head.weight.cores[0] is again.table.weight.cores[0]
        assert [w.spec for _, w in factored(again)] == [w.spec for _, w in factored(small)]
    wide = tensorize.load(tmp_path, model=net(), dtype=torch.float64)
    for name, buffer in small.named_buffers():
        assert wide.get_buffer(name).equal(buffer)
        assert wide.get_buffer(name).dtype == buffer.dtype
    assert relative(wide(IDS).detach(), small(IDS).detach()) < 1e-6


@EACH
def test_bytes_and_numbers_are_those_that_are_held(form: Form) -> None:
    plan, small = plan_of(form), compressed(form)
    after = tensorize.report(small).totals.after
    held = {id(tensor): tensor.nbytes for tensor in (*small.parameters(), *small.buffers())}
    assert after.bytes == plan.predicted.bytes == sum(held.values())
    assert after.parameters == plan.predicted.parameters == numbers(small)
    # One set of scales; each module has codes of its own, as tools know of buffers.
    one, other = small.table.weight, small.head.weight
    assert all(a is b for a, b in zip(one.cores, other.cores, strict=True))
    assert all(a is not b and a.equal(b) for a, b in zip(one.indices, other.indices, strict=True))


@EACH
def test_a_padding_row_stays_zero(form: Form) -> None:
    small = compressed(form)
    assert small.table.weight.dense()[0].count_nonzero() == 0
    small(IDS).square().sum().backward()
    assert small(torch.zeros(1, 1, dtype=torch.long)).isfinite().all()
    assert small.table(torch.zeros(1, dtype=torch.long)).count_nonzero() == 0


@EACH
def test_reports_and_plans_say_the_precision(form: Form, tmp_path: Path) -> None:
    precision, rank, _ = form
    said = f"low rank {rank} {precision}" if rank else f"dense {precision}"
    small = compressed(form)
    report = tensorize.report(small)
    assert said in str(report)
    assert said in str(report.plan)
    assert len(report.factorized) == len(report.sites) == 3
    assert type(report).from_dict(report.to_dict()) == report
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (f"low rank {precision}" if rank else said) in page


@EACH
def test_a_plan_in_json_gives_the_same_model(form: Form) -> None:
    plan = plan_of(form)
    read = Plan.from_json(plan.to_json())
    assert read == plan.alone
    again = tensorize.apply(net(), read, example_inputs=(IDS,))
    assert torch.equal(again(IDS), compressed(form)(IDS))


def test_a_plan_of_a_rank_that_there_is_not_is_refused() -> None:
    with pytest.raises(tensorize.AnalysisError, match="exact"):
        tensorize.apply(net(), plan_of(("int4", 30, False)))


@pytest.mark.parametrize("name", ["up.weight_cores.codes_0", "up.weight_cores.zeros_0"])
@pytest.mark.parametrize("what", ["dtype", "shape"])
def test_codes_that_do_not_fit_are_refused(what: str, name: str, tmp_path: Path) -> None:
    tensorize.save(compressed(("int4", 0, False)), tmp_path)

    def damage(about: Any) -> None:
        entry = about["tensors"][name]
        if what == "dtype":
            entry["dtype"] = "float32"
        else:
            entry["shape"][-1] += 1

    edit_manifest(tmp_path, damage)
    model = net()
    with pytest.raises(CheckpointError, match=name):
        tensorize.load(tmp_path, model=model)
    assert not list(factored(model))
