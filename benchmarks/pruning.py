"""What pruning costs, at shares of the bytes: to be read beside ours of the same text and bytes.

    python -m benchmarks.pruning --models llama gpt smollm2

Models, texts and measures are those of ``benchmarks/bits.py``: the numbers of a model in bfloat16,
measured in float32 on text that is not of the calibration's files. ``benchmarks/prune_peers.py``
says what the methods are, and what a pruned weight takes. Ours at the same bytes: ranks alone, and
bits with ranks, in ``results/bits.json`` (of SmolLM2, ranks alone, in ``results/quality.json``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks import prune_peers
from benchmarks.bits import Draw, best, markdown
from benchmarks.record import keep, kept
from benchmarks.subjects import COMPARED

RESULTS = "pruning"
LARGE = {"smollm2": (0.75,)}
"""Real models: the budgets at which others were measured, and tables, all of them in use, stay."""
OF_SMALL = (0.5, 0.25, 0.125)


def measure(name: str, seed: int, method: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The configurations of a method on one model, with their share of the bytes and figures."""
    draw = Draw(COMPARED[name](seed), seed)
    found = prune_peers.configurations(
        method,
        draw.reference,
        draw.subject.calibration.batches,
        LARGE.get(name, OF_SMALL),
        ends_too=name not in LARGE,
    )
    for title, pruned in found:
        yield title, {"share": pruned.bytes / draw.bytes, **draw.unseen(pruned.model)}


def show(name: str, methods: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a method: the best configuration that fits a budget, and 2:4 with its own share."""
    budgets = LARGE.get(name, OF_SMALL)
    lines = []
    for method, found in methods.items():
        free = {title: f for title, f in found.items() if not title.startswith("2:4")}
        chosen = (best(free, budget, "kl") for budget in budgets)
        cells = ["–" if title is None else f"{free[title]['kl']:.3g}" for title in chosen]
        fixed = (f for title, f in found.items() if title.startswith("2:4"))
        pairs = ", ".join(f"{f['kl']:.3g} at {100 * f['share']:.0f}%" for f in fixed)
        lines.append([method, *cells, pairs])
    return markdown([name, *(f"{100 * b:g}%" for b in budgets), "2:4"], iter(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=COMPARED, default=["llama", "gpt"])
    parser.add_argument("--methods", nargs="+", choices=prune_peers.METHODS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results: dict[str, Any] = kept(RESULTS)
    for name in options.models:
        for method in options.methods or prune_peers.METHODS:
            found = results.setdefault(name, {})[method] = {}
            for title, figures in measure(name, options.seed, method):
                found[title] = figures
                shown = " ".join(f"{key} {value:.5f}" for key, value in figures.items())
                print(f"{name} {method}, {title}: {shown}", flush=True)
                keep(RESULTS, results)
        print(show(name, results[name]))


if __name__ == "__main__":
    main()
