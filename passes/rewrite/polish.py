"""Polish: a few gradient steps on all cores together, on the distance to the dense outputs.

The only step that sees how the errors of different weights add up, and that moves them against
each other. ``descent`` says how the steps are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensorize.base.progress import Progress, no_progress
from tensorize.capture.forward import untouched
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import as_matrix
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call
from tensorize.passes.pipeline import Program
from tensorize.passes.rewrite.descent import (
    Descent,
    rate_for,
    rounds,
    share_of_rate,
    trainable,
    write,
)
from tensorize.weight.install import factored

# Steps: at least the first, at most the second, between them some passes over the data.
_STEPS, _MOST_STEPS, _PASSES = 64, 256, 8
_ATTEMPTS = 3


@dataclass(frozen=True)
class Polish:
    """Program whose cores were trained towards the outputs of ``dense``; ``errors`` are new."""

    dense: nn.Module
    learnt: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    loss: PreservedLoss
    name: str = "polish"

    def run(self, program: Program) -> Program:
        done = polish(
            program.model,
            self.dense,
            self.learnt,
            self.held_out or self.learnt,
            self.loss,
            program.progress,
        )
        parameters = dict(self.dense.named_parameters())
        errors = dict(program.errors)
        for name, weight in factored(program.model):
            if name in errors:
                curve = program.spectra[name]
                dense = as_matrix(curve.site, parameters[name].detach())
                cores = [core.detach().float() for core in weight.cores]
                rebuilt = weight.format.reconstruct(weight.spec, cores)
                errors[name] = curve.measured_error(dense, rebuilt)
        summary = f"{done.steps} steps: {done.before:.4g} to {done.after:.4g} on held-out batches"
        return replace(program, errors=errors, summary=summary)


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
    with untouched(small), untouched(dense):
        before = loss.mean_distance(small, dense, held_out)
        start = [core.detach().float().clone() for core in cores]
        steps = min(max(_STEPS, _PASSES * len(batches)), _MOST_STEPS)
        rate = rate_for(before)
        after = before
        for attempt in range(_ATTEMPTS):  # too far the first time: a quarter of it
            write(cores, start)
            run = _descend(small, dense, cores, batches, steps, rate / 4**attempt, loss, progress)
            kept = start
            for _ in run:
                reached = loss.mean_distance(small, dense, held_out)
                if reached < after:
                    after, kept = reached, [core.detach().clone() for core in cores]
            write(cores, kept)
            if after < before:
                break
        progress("polish", steps, steps)
    return Polished(before, after, steps)


def _descend(
    small: nn.Module,
    dense: nn.Module,
    cores: Sequence[Tensor],
    batches: Sequence[Batch],
    steps: int,
    rate: float,
    loss: PreservedLoss,
    progress: Progress,
) -> Iterator[int]:
    """Adam on the cores in place; stops at each quarter of the way for the caller to look."""
    descent = Descent(cores, rate)
    for done, position in enumerate(rounds(len(batches), steps)):
        progress("polish", done, steps)
        batch = batches[position]
        with trainable(cores):
            wanted = call(dense, batch)
            with torch.enable_grad():
                result = small(*batch.args, **batch.kwargs)
                total, rows = loss.distance(wanted, result, batch, small)
                gradients = torch.autograd.grad(total / rows, cores, allow_unused=True)
        descent.step(gradients, share_of_rate(done, steps))
        if (done + 1) % (steps // 4) == 0:
            yield done + 1
