"""Compression without data: what the weights alone give, and what data the model makes itself.

    python -m benchmarks.no_data

Three trained models, other text to measure on: KL to the dense model in nats a token for the two
decoders, the squared difference of the embeddings over their variance for the sentence encoder.
"The default" is ``tensorize.compile(model, budget)``, which calibrates on less data of the model's
own than ``calibration="self"``. "Weights alone" is ``metric="frobenius"``; beside it the same
factors with other ways to compare errors between weights. Real text is what there is to be gained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tensorize
from benchmarks.peers import compared, uniform_plan
from benchmarks.record import keep
from benchmarks.subjects import DECODERS, divergence, text
from examples import demo_minilm
from tensorize.base.printer import table

BUDGETS = (0.25, 0.5, 0.75)


@dataclass
class Subject:
    """A model, inputs to see its weights in use, real text, and how far another model is off."""

    model: nn.Module
    inputs: Any
    real: list[Any]
    distance: Callable[[nn.Module], float]


def decoder(name: str) -> Subject:
    model, unseen = DECODERS[name](), text("held_out", 32, 256)
    real = list(text("validation", 32, 256).split(4))
    return Subject(model, (unseen[:1],), real, lambda other: divergence(other, model, unseen))


def encoder() -> Subject:
    with demo_minilm.quiet_transformers():
        model = demo_minilm.trained().eval()
        tokenizer = demo_minilm.load_tokenizer(demo_minilm.weights_folder())
    known, unseen = (
        [dict(batch) for batch in demo_minilm.batches_of(tokenizer, texts)]
        for texts in demo_minilm.sentences(256, 256, 0)
    )
    with torch.no_grad():
        dense = demo_minilm.embed(model, unseen)

    def distance(other: nn.Module) -> float:
        return demo_minilm.difference(dense, demo_minilm.embed(other, unseen))

    return Subject(model, known[0], known, distance)


def rows(subject: Subject) -> dict[str, list[float]]:
    """Method → distance by budget."""
    model = subject.model

    def analyze(calibration: Any, metric: str | None = None) -> tensorize.Analysis:
        return tensorize.analyze(
            model,
            example_inputs=subject.inputs,
            calibration=calibration,
            metric=metric,
            progress=False,
        )

    def distances(plan: Callable[[float], tensorize.Plan]) -> list[float]:
        small = (tensorize.apply(model, plan(budget), progress=False) for budget in BUDGETS)
        return [subject.distance(other) for other in small]

    alone = analyze(None, "frobenius")
    found = {"uniform": distances(lambda budget: uniform_plan(alone, model, budget))}
    for name, value in (("absolute errors", 0.0), ("relative errors", 1.0)):
        found[name] = distances(compared(alone, value).plan)
    found["weights alone"] = distances(alone.plan)
    found["the default"] = distances(analyze(None).plan)
    found['calibration="self"'] = distances(analyze("self").plan)
    found["real text"] = distances(analyze(subject.real).plan)
    return found


def main() -> None:
    results = {}
    for name, make in (("gpt", decoder), ("llama", decoder), ("minilm", None)):
        results[name] = rows(make(name) if make is not None else encoder())
        cells = [[m, *(f"{v:.3g}" for v in values)] for m, values in results[name].items()]
        print(f"\n{name}")
        print(table(["method", *(f"{budget:g} kept" for budget in BUDGETS)], cells), flush=True)
    print(f"kept in {keep('no_data', {'budgets': BUDGETS, 'distances': results})}")


if __name__ == "__main__":
    main()
