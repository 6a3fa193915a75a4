"""Polish: a few gradient steps on all cores together, on the distance to the dense outputs.

The only step that sees how the errors of different weights add up, and that moves them against
each other. Adam (Kingma & Ba 2015) with steps relative to the size of each core; how large they
may be follows from the damage: a model that is off by little is not to be moved by much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensorize import tt
from tensorize.forward import untouched
from tensorize.ir import Batch
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import PreservedLoss, call
from tensorize.passes.spectra import as_matrix
from tensorize.progress import Progress, no_progress
from tensorize.weight import factored

# Steps: at least the first, at most the second, between them some passes over the data.
_STEPS, _MOST_STEPS, _PASSES = 64, 256, 8
# The largest relative step of a core is this times the square root of the damage, measured on two
# trained decoders at damages from .001 to .4: half of it learns slower, twice as much overshoots.
_RATE, _LARGEST_RATE = 0.035, 0.03
_WARM_UP = 0.1
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
                rebuilt = tt.reconstruct(weight.spec, [c.detach().float() for c in weight.cores])
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
        before = _distance(small, dense, held_out, loss)
        start = [core.detach().float().clone() for core in cores]
        steps = min(max(_STEPS, _PASSES * len(batches)), _MOST_STEPS)
        rate = min(_RATE * math.sqrt(max(before, 0.0)), _LARGEST_RATE)
        after = before
        for attempt in range(_ATTEMPTS):  # too far the first time: a quarter of it
            _write(cores, start)
            run = _descend(small, dense, cores, batches, steps, rate / 4**attempt, loss, progress)
            kept = start
            for _ in run:
                reached = _distance(small, dense, held_out, loss)
                if reached < after:
                    after, kept = reached, [core.detach().clone() for core in cores]
            _write(cores, kept)
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
    # Steps are taken on float32 copies: in half precision small ones would be rounded away.
    masters = [core.detach().float().clone() for core in cores]
    sizes = [float(master.square().mean().sqrt()) for master in masters]
    adam = torch.optim.Adam(
        [{"params": [m], "lr": rate * size} for m, size in zip(masters, sizes, strict=True)],
        betas=(0.9, 0.95),
    )
    largest = [group["lr"] for group in adam.param_groups]
    for done, (position, batch) in enumerate(_rounds(batches, steps)):
        progress("polish", done, steps)
        share = min(1.0, (done + 1) / (_WARM_UP * steps)) * _cosine(done / steps)
        for group, lr in zip(adam.param_groups, largest, strict=True):
            group["lr"] = lr * share
        with _trainable(cores):
            wanted = call(dense, batch, position)
            with torch.enable_grad():
                total, rows = loss.distance(wanted, call(small, batch, position), batch, small)
                gradients = torch.autograd.grad(total / rows, cores, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        adam.step()
        _write(cores, masters)
        if (done + 1) % (steps // 4) == 0:
            yield done + 1


def _distance(
    small: nn.Module, dense: nn.Module, batches: Sequence[Batch], loss: PreservedLoss
) -> float:
    total, rows = 0.0, 0
    for position, batch in enumerate(batches):
        wanted, got = call(dense, batch, position), call(small, batch, position)
        part, count = loss.rise(wanted, got, batch, small)
        total, rows = total + part, rows + count
    return total / max(rows, 1)


def _rounds(batches: Sequence[Batch], steps: int) -> Iterator[tuple[int, Batch]]:
    """Every batch in turn, in an order of its own each time."""
    generator = torch.Generator().manual_seed(0)
    done = 0
    while True:
        for position in torch.randperm(len(batches), generator=generator).tolist():
            if done == steps:
                return
            yield position, batches[position]
            done += 1


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _trainable(cores: Sequence[Tensor]) -> Iterator[None]:
    """Cores ask for gradients, whatever the model's own weights do."""
    before = [core.requires_grad for core in cores]
    for core in cores:
        core.requires_grad_(True)
    try:
        yield
    finally:
        for core, asked in zip(cores, before, strict=True):
            core.requires_grad_(asked)


@torch.no_grad()
def _write(cores: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for core, value in zip(cores, values, strict=True):
        core.copy_(value)
