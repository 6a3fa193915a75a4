"""A step of a strategy run through its schedule: what every stage's streams do, from when to when.

A stage computes one pass after the other; its links to the stages beside it, the data-parallel
collectives and the optimizer's host work at the same time. All devices of a stage do the same, so
that a step of thousands of devices has as many rows as stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tensorize.base.errors import check_one_of
from tensorize.distributed.strategy.estimate import Estimate, StageSeconds

FORWARD, BACKWARD = "forward", "backward"
COLLECTIVE, SEND, DATA, UPDATE = "tensor parallel", "send", "data parallel", "update"
SCHEDULES = ("1f1b", "gpipe")
_GATHERED = {FORWARD: 0.25, BACKWARD: 0.75}
"""Of the collectives of sharded parameters: one gather before a forward pass; another one, and the
scatter of gradients twice as wide, with its backward pass."""


@dataclass(frozen=True)
class Span:
    """What a stage does from when to when, with which micro-batch (None: with none)."""

    stage: int
    kind: str
    start: float
    end: float
    micro: int | None = None


@dataclass(frozen=True)
class Timeline:
    """A simulated step: its spans, and how many devices stand behind each stage."""

    estimate: Estimate
    schedule: str
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        return max(span.end for span in self.spans)

    @property
    def stages(self) -> int:
        return self.estimate.strategy.pp

    def busy(self, stage: int) -> float:
        """The share of the step in which a stage computes."""
        kinds = (FORWARD, BACKWARD)
        own = (s.end - s.start for s in self.spans if s.stage == stage and s.kind in kinds)
        return sum(own) / self.seconds

    def to_svg(self) -> str:
        """A picture: a row a stage, time from left to right."""
        from tensorize.distributed.strategy.picture import svg

        return svg(self)


def simulate(estimate: Estimate, schedule: str = "1f1b") -> Timeline:
    """Step through a schedule.

    Args:
        estimate: one that knows its stages: ``plan.best``, or what ``plan.explain`` gives.
        schedule: ``"1f1b"`` (a backward pass as soon as there is one) or ``"gpipe"`` (all forward
            passes first).

    Raises:
        TensorizeError: the schedule is unknown.
    """
    check_one_of("schedule", schedule, SCHEDULES)
    passes = [list(_order(estimate, k, schedule)) for k in range(estimate.strategy.pp)]
    run = _Run(estimate)
    while any(passes):
        for stage, left in enumerate(passes):
            while left and run.ready(stage, *left[0]):
                run.take(stage, *left.pop(0))
    for stage in range(estimate.strategy.pp):
        run.finish(stage)
    return Timeline(estimate, schedule, tuple(run.spans))


def _order(estimate: Estimate, stage: int, schedule: str) -> Iterator[tuple[str, int]]:
    """The passes of a stage, in the order that it takes them."""
    micro = estimate.strategy.micro
    ahead = micro if schedule == "gpipe" else min(estimate.strategy.pp - stage, micro)
    yield from ((FORWARD, k) for k in range(ahead))
    for k in range(micro):
        yield BACKWARD, k
        if k + ahead < micro:
            yield FORWARD, k + ahead


class _Run:
    """What has been done so far: when each stage is free, and when each message has come."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate, self.spans = estimate, []
        self._free = [0.0] * estimate.strategy.pp
        self._links: dict[tuple[int, int], float] = {}
        self._come: dict[tuple[str, int, int], float] = {
            (FORWARD, 0, k): 0.0 for k in range(estimate.strategy.micro)
        }
        self._last: dict[int, Span] = {}

    def ready(self, stage: int, kind: str, micro: int) -> bool:
        return (kind, stage, micro) in self._come

    def take(self, stage: int, kind: str, micro: int) -> None:
        """One pass of a stage, and the message that it sends."""
        own, strategy = self.estimate.stages[stage], self.estimate.strategy
        start = max(self._free[stage], self._come[kind, stage, micro])
        computed, sent = _parts(own, kind)
        end = start + computed + sent
        self._note(stage, kind, start, start + computed, micro)
        self._note(stage, COLLECTIVE, start + computed, end, micro)
        if strategy.sharded:
            gathered = start + own.reduce * _GATHERED[kind] / strategy.micro
            self._note(stage, DATA, start, gathered, micro)
            end = max(end, gathered)
        self._free[stage] = end
        self._last[stage] = Span(stage, kind, start, end, micro)
        other = stage + 1 if kind == FORWARD else stage - 1
        if kind == FORWARD and other == strategy.pp:
            self._come[BACKWARD, stage, micro] = end
        elif 0 <= other < strategy.pp:
            leaves = max(end, self._links.get((stage, other), 0.0))
            comes = self._links[stage, other] = leaves + own.send
            self._note(stage, SEND, leaves, comes, micro)
            self._come[kind, other, micro] = comes

    def finish(self, stage: int) -> None:
        """What comes after the last backward pass: gradients, and the optimizer's update."""
        own, strategy, last = self.estimate.stages[stage], self.estimate.strategy, self._last[stage]
        end = last.end
        if own.reduce and not strategy.sharded:
            # Each layer's gradients leave once they are there; those of the last one wait for it.
            layers = self.estimate.layers / strategy.pp
            begins = last.start + (last.end - last.start) / max(layers, 1)
            end = max(begins + own.reduce, last.end + own.reduce / max(layers, 1))
            self._note(stage, DATA, begins, end)
        self._note(stage, UPDATE, end, end + own.update)

    def _note(
        self, stage: int, kind: str, start: float, end: float, micro: int | None = None
    ) -> None:
        if end > start:
            self.spans.append(Span(stage, kind, start, end, micro))


def _parts(own: StageSeconds, kind: str) -> tuple[float, float]:
    """Seconds of a pass: what it computes, and its collectives."""
    if kind == FORWARD:
        return own.forward, own.forward_sent
    return own.backward, own.backward_sent
