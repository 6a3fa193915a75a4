"""On trained weights, weighing errors by what they do to the outputs must pay."""

from __future__ import annotations

import pytest

import tensorize
from benchmarks.peers import uniform_plan
from benchmarks.subjects import loss, text
from examples.gpt import load_pretrained


@pytest.mark.slow
def test_two_sided_global_beats_uniform_plain_svd_on_held_out_text() -> None:
    model = load_pretrained().eval()
    context = model.config.context
    calibration = list(text("validation", 16, context).split(4))
    held_out = text("held_out", 16, context)
    dense = loss(model, held_out)
    ours = tensorize.analyze(model, calibration=calibration)
    plain = tensorize.analyze(model, example_inputs=(held_out[:1],))
    for budget in (0.25, 0.5):
        uniform = uniform_plan(plain, model, budget)
        plan = ours.plan(tensorize.Budget(params=uniform.predicted.parameters))
        assert plan.predicted.parameters <= uniform.predicted.parameters
        rise = loss(tensorize.apply(model, plan), held_out) - dense
        plain_rise = loss(tensorize.apply(model, uniform), held_out) - dense
        assert rise < 0.5 * plain_rise
