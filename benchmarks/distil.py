"""Compressed and healed, or a smaller dense model distilled: at equal parameters and equal data.

    python -m benchmarks.distil --budgets 0.1 0.25 --steps 300
    python -m benchmarks.distil --budgets 0.1 --steps 1000 --rates 0.006

The trained GPT (``examples/gpt.py``) is compressed with 64 windows of text that it was not trained
on, and healed on windows of its training text. Students are dense GPTs of at most as many
parameters, trained on the same windows against the same outputs of the GPT (KL; AdamW, cosine
schedule with a warm-up, the better of two rates): one that is as deep and narrower, from random
weights, and, where one fits, one that is as wide and keeps its first blocks, embeddings and last
norm. None has labels. Figures are of other text again: the KL to the GPT's prediction, in nats a
token. Seconds are those of training, on a machine that may have had other work.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep, kept
from benchmarks.subjects import BATCH, CONTEXT, WINDOWS, divergence, text
from examples.gpt import GPT, load_pretrained
from tensorize.base.printer import table

RATES = (2e-3, 6e-3)
WARM_UP = 0.05
SPARE_BATCHES = 6
"""Batches more than steps: a healing holds some out."""


def narrower(teacher: GPT, parameters: int) -> GPT:
    """As deep, and as wide as so many parameters allow, with heads of the same width."""
    head = teacher.config.width // teacher.config.heads
    sizes = (
        replace(teacher.config, width=width, heads=max(1, width // head))
        for width in range(teacher.config.width, 0, -1)
        if width % max(1, width // head) == 0
    )
    with torch.device("meta"):
        fits = next(size for size in sizes if count(GPT(size)) <= parameters)
    return GPT(fits)


def shallower(teacher: GPT, parameters: int) -> GPT | None:
    """The first blocks of the teacher, as many as fit, between its embeddings and its last norm."""
    for layers in range(teacher.config.layers - 1, 0, -1):
        student = copy.deepcopy(teacher)
        del student.blocks[layers:]
        student.config = replace(teacher.config, layers=layers)
        if count(student) <= parameters:
            return student
    return None


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def distil(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], rate: float) -> None:
    """Train a dense student on the teacher's outputs, a step a batch."""
    distance = tensorize.distillation_loss(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, int(WARM_UP * len(batches)))

    def scale(step: int) -> float:
        late = (step - warm) / max(1, len(batches) - warm)
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * late))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    student.train()
    for batch in batches:
        optimizer.zero_grad()
        distance(student, batch).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    student.eval()


def measure(
    budget: float, every_steps: Sequence[int], rates: Sequence[float], seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The compressed model and the students of its size, by name, with their figures."""
    dense = load_pretrained()
    calibration = text("validation", WINDOWS, CONTEXT, seed=seed).split(BATCH)
    unseen = text("held_out", WINDOWS, CONTEXT, seed=seed)
    plan = tensorize.analyze(dense, calibration=calibration, seed=seed).plan(budget)
    small = tensorize.apply(dense, plan)
    size = tensorize.report(small).totals.after.parameters
    yield "compressed", {"parameters": size, "kl": divergence(small, dense, unseen)}
    for steps in every_steps:
        drawn = text("train", (steps + SPARE_BATCHES) * BATCH, CONTEXT, seed=seed).split(BATCH)
        for kind, build in (("narrower", narrower), ("its first blocks", shallower)):
            if build(dense, size) is None:
                continue
            for rate in rates:
                torch.manual_seed(seed)
                student = build(dense, size)
                assert student is not None
                began = time.perf_counter()
                distil(student, dense, drawn[:steps], rate)
                yield (
                    f"{kind}, {steps} steps at {rate:g}",
                    {
                        "parameters": count(student),
                        "kl": divergence(student, dense, unseen),
                        "seconds": time.perf_counter() - began,
                        "config": student.config.to_dict(),
                    },
                )
        healed = copy.deepcopy(small)
        began = time.perf_counter()
        tensorize.heal(healed, dense, drawn, steps=steps, seed=seed)
        yield (
            f"compressed and healed, {steps} steps",
            {
                "parameters": size,
                "kl": divergence(healed, dense, unseen),
                "seconds": time.perf_counter() - began,
            },
        )


def show(results: dict[str, Any]) -> str:
    """One row a model."""
    rows = [
        [key, name, f"{f['parameters']:,}", f"{f['kl']:.3g}", f"{f.get('seconds', 0):.0f} s"]
        for key, found in results.items()
        for name, f in found.items()
    ]
    return table(["kept", "model", "parameters", "KL", "training"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.25])
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 1000])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = kept("distil")
    for budget in options.budgets:
        found = results.setdefault(f"{budget:g}", {})
        for name, figures in measure(budget, options.steps, options.rates, options.seed):
            found[name] = figures
            print(f"{budget:g} {name}: {figures}", flush=True)
            keep("distil", results)
    print(show(results))


if __name__ == "__main__":
    main()
