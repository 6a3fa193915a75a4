"""How much of the loss that compression costs a healing gives back, on the trained decoders.

    python -m benchmarks.heal --models gpt llama --budgets 0.1

Each decoder (``examples/``) is compressed with 64 windows of text that it was not trained on, and
healed on windows of its training text, without labels. Figures are of other text again: the KL to
the dense model's prediction, and the rise of the text's own cross-entropy, in nats a token, before
and after, and the share of the rise that is gone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorize
from benchmarks.record import keep, kept
from benchmarks.subjects import BATCH, CONTEXT, DECODERS, WINDOWS, divergence, loss, text
from tensorize.base.printer import table

STEPS = 300
VARIANTS: dict[str, dict[str, Any]] = {
    "cores": {},
    "cores and layers": {"layers": True},
    "all parameters": {"train": "all"},
}


def measure(
    name: str, budget: float, steps: int, seed: int, variants: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Variants of a healing of one model at one budget."""
    dense = DECODERS[name]()
    calibration = text("validation", WINDOWS, CONTEXT, seed=seed).split(BATCH)
    unseen = text("held_out", WINDOWS, CONTEXT, seed=seed)
    batches = text("train", (steps + 6) * BATCH, CONTEXT, seed=seed).split(BATCH)
    plan = tensorize.analyze(dense, calibration=calibration).plan(budget)
    own = loss(dense, unseen)
    for variant in variants:
        small = tensorize.apply(dense, plan)
        before = {"kl": divergence(small, dense, unseen), "rise": loss(small, unseen) - own}
        began = time.perf_counter()
        done = tensorize.heal(small, dense, batches, steps=steps, seed=seed, **VARIANTS[variant])
        seconds = time.perf_counter() - began
        after = {"kl": divergence(small, dense, unseen), "rise": loss(small, unseen) - own}
        shown = ", ".join(f"{k} {before[k]:.3f} to {after[k]:.3f}" for k in before)
        print(f"{name} {budget:g} {variant}: {shown}, {seconds:.0f} s", flush=True)
        yield (
            variant,
            {
                "before": before,
                "after": after,
                "recovered": {k: 1 - after[k] / before[k] for k in before},
                "seconds": seconds,
                "checks": done.checks,
                "best_step": done.best_step,
                "stopped_early": done.stopped_early,
            },
        )


def show(results: dict[str, Any]) -> str:
    """One row a model, a budget and a variant."""
    rows = []
    for key, variants in results.items():
        for variant, f in variants.items():
            cells = [
                f"{f['before'][k]:.3f} → {f['after'][k]:.3f} ({100 * f['recovered'][k]:.0f} %)"
                for k in ("kl", "rise")
            ]
            rows.append([key, variant, *cells, f"{f['seconds']:.0f} s"])
    return table(
        ["model, kept, steps", "trained", "KL (recovered)", "rise of the loss", "time"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=list(DECODERS), default=list(DECODERS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = kept("heal")
    for name in options.models:
        for budget in options.budgets:
            key = f"{name}, {100 * budget:g} %, {options.steps}"
            run = measure(name, budget, options.steps, options.seed, options.variants)
            for variant, figures in run:
                results.setdefault(key, {})[variant] = figures
                keep("heal", results)
    print(show(results))


if __name__ == "__main__":
    main()
