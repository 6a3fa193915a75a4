"""Polish: a few gradient steps on all cores together, on the distance to the dense outputs.

The only step that sees how the errors of different weights add up, and that moves them against
each other. ``descent`` says how the steps are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensorize.base.progress import Progress, no_progress
from tensorize.base.tensors import singled
from tensorize.capture.forward import once, untouched
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import as_matrix
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call
from tensorize.passes.rewrite.descent import Descent, rate_for, rounds
from tensorize.passes.stages import Rewritten
from tensorize.weight.install import factored

# Steps: at least the first, at most the second, between them some passes over the data.
_STEPS, _MOST_STEPS, _PASSES = 64, 256, 8
_ATTEMPTS = 3


@dataclass(frozen=True)
class Polish:
    """Trains the cores towards the outputs of ``dense``, and measures the errors again."""

    dense: nn.Module
    learnt: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    loss: PreservedLoss
    name: str = "polish"

    def run(self, before: Rewritten) -> Rewritten:
        done = polish(
            before.model,
            self.dense,
            self.learnt,
            self.held_out or self.learnt,
            self.loss,
            before.progress,
        )
        parameters = dict(self.dense.named_parameters())
        errors = dict(before.errors)
        for name, weight in factored(before.model):
            if name in errors:
                curve = before.spectra[name]
                dense = as_matrix(curve.site, parameters[name].detach())
                cores = tuple(singled(core.detach()) for core in weight.cores)
                rebuilt = as_matrix(curve.site, weight.with_cores(cores).dense())
                errors[name] = curve.measured_error(dense, rebuilt)
        summary = f"{done.steps} steps: {done.before:.4g} to {done.after:.4g} on held-out batches"
        return replace(before, errors=errors, summary=summary)


@dataclass(frozen=True)
class Polished:
    """How far the outputs were off before and after, on held-out batches, and the steps taken."""

    before: float
    after: float
    steps: int


def polish(
    small: nn.Module,
    dense: nn.Module,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    loss: PreservedLoss,
    progress: Progress = no_progress,
) -> Polished:
    """Train the cores of ``small`` in place; the best cores seen on ``held_out`` are kept."""
    cores = list({id(c): c for _, weight in factored(small) for c in weight.cores}.values())
    if not cores:
        return Polished(0.0, 0.0, 0)

    def learn(position: int) -> Tensor:
        batch = batches[position]
        with torch.no_grad():
            wanted = call(dense, batch)
        total, rows = loss.distance(wanted, once(small, batch), batch, small)
        return total / rows

    def judge() -> float:
        return loss.mean_distance(small, dense, held_out)

    with untouched(small, but=cores), untouched(dense):
        before = after = judge()
        steps = min(max(_STEPS, _PASSES * len(batches)), _MOST_STEPS)
        for attempt in range(_ATTEMPTS):  # too far the first time: a quarter of it
            rate = rate_for(before) / 4**attempt
            run = Descent(cores, learn, judge, before, steps=steps, every=steps // 4, rate=rate)
            progress("polish", 0, steps)
            for _ in run.run(rounds(len(batches), steps)):
                progress("polish", run.state.done, steps)
            after = run.state.best
            if after < before:
                break
        progress("polish", steps, steps)
    return Polished(before, after, steps)
