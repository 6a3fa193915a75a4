"""A simulated step: what depends on what is kept, and it takes what the closed formula says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tensorize.base.errors import TensorizeError
from tensorize.distributed import CLUSTERS, Strategy, Workload, plan
from tensorize.distributed.strategy.estimate import Estimator, StageSeconds
from tensorize.distributed.strategy.simulate import BACKWARD, FORWARD, simulate

MODEL = Workload.decoder(2048, 5632, 16, 16, 32000, rank=512)
FOUND = plan(MODEL, devices=64, machine="a100-40", batch=128, sequence=2048)
WAYS = {
    "data parallel": Strategy(1, 64, 1, "plain", 2, 1),
    "pipeline": Strategy(8, 8, 1, "plain", 1, 16),
    "pipeline of parts": Strategy(4, 4, 4, "btp", 2, 16, "low rank"),
    "naive": Strategy(4, 4, 4, "naive", 1, 32),
    "sharded": Strategy(1, 64, 1, "plain", 1, 2, sharded=True),
    "on the host": Strategy(2, 16, 2, "btp", 4, 2, offload=True),
}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_take_the_time_of_the_textbook(schedule: str) -> None:
    """(m + p - 1) (f + b), without messages (Narayanan et al. 2019)."""
    estimate = FOUND.explain(WAYS["pipeline"])
    same = StageSeconds(1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    timeline = simulate(replace(estimate, stages=(same,) * 8), schedule)
    assert timeline.seconds == pytest.approx((16 + 8 - 1) * 3.0)
    assert timeline.busy(0) == pytest.approx(16 / 23)


@pytest.mark.parametrize("name", list(WAYS))
def test_a_simulated_step_takes_what_the_plan_says(name: str) -> None:
    estimate = FOUND.explain(WAYS[name])
    timeline = simulate(estimate)
    # The formula lets every message wait; in the schedule most are hidden.
    assert 0.9 * estimate.total <= timeline.seconds <= 1.02 * estimate.total


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_nothing_starts_before_what_it_needs(schedule: str) -> None:
    strategy = WAYS["pipeline of parts"]
    timeline = FOUND.timeline(strategy, schedule)
    passes = {
        (span.kind, span.stage, span.micro): span
        for span in timeline.spans
        if span.kind in (FORWARD, BACKWARD)
    }
    send = timeline.estimate.stages[0].send
    assert send > 0
    assert len(passes) == 2 * strategy.pp * strategy.micro
    for (kind, stage, micro), span in passes.items():
        before = stage - 1 if kind == FORWARD else stage + 1
        if 0 <= before < strategy.pp:
            assert span.start >= passes[kind, before, micro].end + send - 1e-12
        if kind == BACKWARD:
            assert span.start >= passes[FORWARD, stage, micro].end
    for stage in range(strategy.pp):
        own = sorted(
            (s.start, s.end)
            for s in timeline.spans
            if s.stage == stage and s.kind in (FORWARD, BACKWARD)
        )
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))


def test_a_stage_has_begun_with_no_more_micro_batches_than_its_memory_counts() -> None:
    strategy = WAYS["pipeline"]
    timeline = FOUND.timeline(strategy)
    for stage in range(strategy.pp):
        own = [s for s in timeline.spans if s.stage == stage]
        live = most = 0
        for span in sorted(own, key=lambda s: s.start):
            live += (span.kind == FORWARD) - (span.kind == BACKWARD)
            most = max(most, live)
        assert most <= min(strategy.pp - stage, strategy.micro)


def test_thousands_of_devices_are_one_picture() -> None:
    large = Workload.decoder(12288, 49152, 96, 96, 51200, gated=False)
    strategy = Strategy(16, 32, 8, "megatron", 1, 32, "layers")
    estimate = Estimator(large, CLUSTERS["h100"], 2048)(strategy, stages=True)
    picture = ElementTree.fromstring(simulate(estimate).to_svg())
    rows = [e for e in picture.iter() if e.tag.endswith("text") and "stage" in (e.text or "")]
    assert len(rows) == 16
    assert any("each of the 16 rows is 256 devices" in (e.text or "") for e in picture.iter())


def test_a_schedule_that_is_unknown_is_refused() -> None:
    with pytest.raises(TensorizeError, match="1f1b"):
        FOUND.timeline(schedule="zigzag")
