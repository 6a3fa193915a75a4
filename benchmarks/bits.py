"""What fewer bits and lower ranks cost, side by side with other methods, at equal bytes.

    python -m benchmarks.bits --models gpt llama minilm --seeds 0

The models, texts and measures are those of ``benchmarks/quality.py``, the models in bfloat16, whose
bytes budgets are shares of. What is measured is the distance to the dense model in float32 with the
same numbers: in full, in float32 with what a smaller model has stored; and as it runs, in bfloat16,
where products of ours with int8 weights are products of integers (a refit sees those, too).

``benchmarks/bit_peers.py`` says what the other methods are. At every budget theirs is the best of
all their configurations that fit, a choice that ours has not: each of ours is the plan of that
budget alone. Ours with the same integers for all weights has the bytes that these take.

Results are kept by model, seed and method, after every method: ``--resume`` adds what is missing,
and several processes may share the methods (``--methods``) and models. HQQ and
torchao are not compared with: the benchmarks need no package that is not installed for them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import tensorize
from benchmarks import bit_peers
from benchmarks.quality import TITLES, Run, accuracy, predicted, show_predictions
from benchmarks.record import keep, kept
from benchmarks.subjects import COMPARED, DECODERS, Measure, Subject
from tensorize.base.errors import BudgetError
from tensorize.formats.quantized import inputs_in_full

RESULTS = "bits"
BUDGETS = (0.5, 0.35, 0.25, 0.18, 0.125, 0.08)
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, one-shot": {"refine": None},
    "ours, bits alone": {"formats": "dense"},
    "ours, ranks alone": {"precision": None},
}
UNIFORM = "ours, the same integers for all"
INTEGERS = ("int4", "int3", "int2")
METHODS = (*OURS, UNIFORM, *bit_peers.METHODS)
AS_IT_RUNS = "as it runs"


@dataclass
class Draw:
    """One model in bfloat16 and one draw of text."""

    subject: Subject
    seed: int

    @cached_property
    def model(self) -> nn.Module:
        return self.subject.model.to(torch.bfloat16)

    @cached_property
    def reference(self) -> nn.Module:
        """The same numbers in float32."""
        return copy.deepcopy(self.model).to(torch.float32)

    @cached_property
    def unseen(self) -> Measure:
        return replace(self.subject.unseen, model=self.reference)

    @cached_property
    def alike(self) -> Measure:
        """On other text of the calibration's files, which is what predictions are of."""
        return replace(self.subject.alike, model=self.reference)

    @cached_property
    def analysis(self) -> tensorize.Analysis:
        return tensorize.analyze(
            self.model,
            calibration=self.subject.calibration.batches,
            precision="auto",
            seed=self.seed,
            progress=False,
        )

    @cached_property
    def bytes(self) -> int:
        return stored_bytes(self.model)

    def methods(self) -> dict[str, Iterator[tuple[str, dict[str, float]]]]:
        """Method → its configurations by name, with their figures, one after another."""
        return {
            **{method: self._ours(options) for method, options in OURS.items()},
            UNIFORM: self._uniform(),
            **{method: self._of_others(method) for method in bit_peers.METHODS},
        }

    def _ours(self, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
        for budget in BUDGETS:
            try:
                plan = self.analysis.plan(tensorize.Budget(bytes=budget), **options)
            except BudgetError:  # ranks alone end above the smallest budgets
                continue
            yield str(budget), self._figures(plan)

    def _uniform(self) -> Iterator[tuple[str, dict[str, float]]]:
        for name in INTEGERS:
            yield name, self._figures(self.analysis.plan(1.0, formats="dense", precision=name))

    def _figures(self, plan: tensorize.Plan) -> dict[str, float]:
        began = time.perf_counter()
        small = tensorize.apply(self.model, plan, progress=False)
        took = {"seconds": time.perf_counter() - began, "share": stored_bytes(small) / self.bytes}
        runs = {f"{key} {AS_IT_RUNS}": value for key, value in self.unseen(small).items()}
        with inputs_in_full():
            full = self.unseen(small.to(torch.float32))
        return {**took, **full, **runs, **predicted(plan.predicted)}

    def _of_others(self, method: str) -> Iterator[tuple[str, dict[str, float]]]:
        calibration = self.subject.calibration.batches
        for name, rounded in bit_peers.configurations(method, self.reference, calibration):
            yield name, {"share": rounded.bytes / self.bytes, **self.unseen(rounded.model)}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of what a model would be saved as, shared storage once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(name: str, seed: int, methods: Sequence[str], *, resume: bool) -> None:
    """Some methods on one model and one draw of text."""
    known = kept_draw(name, seed)
    missing = [method for method in methods if not (resume and method in known)]
    if not missing:
        return
    configurations = Draw(COMPARED[name](seed), seed).methods()
    for method in missing:
        found = {}
        for configuration, figures in configurations[method]:
            found[configuration] = figures
            shown = " ".join(f"{key} {value:.5f}" for key, value in figures.items())
            print(f"{name} {seed} {method}, {configuration}: {shown}", flush=True)
        # Read again: another process may have kept other methods meanwhile.
        draw = {**kept_draw(name, seed), method: found}
        results = kept(RESULTS)
        keep(RESULTS, {**results, name: {**results.get(name, {}), str(seed): draw}})


def kept_draw(name: str, seed: int) -> Run:
    return kept(RESULTS).get(name, {}).get(str(seed), {})


# ------------------------------------------------------------------------------------- the tables


def best(found: Mapping[str, Mapping[str, float]], budget: float, key: str) -> str | None:
    """The configuration of a method at a budget: its plan, or the best of those that fit."""
    if str(budget) in found:
        return str(budget)
    fits = [name for name, figures in found.items() if figures["share"] <= budget]
    planned = any(str(each) in found for each in BUDGETS)
    return None if planned or not fits else min(fits, key=lambda name: found[name][key])


def rows(runs: Sequence[Run], key: str) -> Iterator[list[str]]:
    """A row a method: the mean over the draws that have it; ours a second time, as it runs."""
    for method in runs[0]:
        for suffix in ("", f" {AS_IT_RUNS}"):
            figure = key + suffix
            if any(figure in figures for figures in runs[0][method].values()):
                title = method + (f", {AS_IT_RUNS}" if suffix else "")
                yield [title, *(cell(runs, method, budget, figure) for budget in BUDGETS)]


def cell(runs: Sequence[Run], method: str, budget: float, key: str) -> str:
    values = []
    for run in (run for run in runs if method in run):
        name = best(run[method], budget, key)
        if name is None:
            return "–"
        values.append(run[method][name][key])
    return f"{sum(values) / len(values):.3g}"


def markdown(headers: Sequence[str], lines: Iterator[list[str]]) -> str:
    every = [list(headers), ["---"] * len(headers), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def show(name: str) -> None:
    """Prints the table of one model, and which configurations of the other methods it is of."""
    draws = kept(RESULTS)[name]
    runs = [{method: run[method] for method in METHODS if method in run} for run in draws.values()]
    figures = next(iter(next(iter(runs[0].values())).values()))
    key = next(key for key in TITLES if key in figures)
    print(f"\n{TITLES[key]}, by share of the bytes in bfloat16; seeds {', '.join(draws)}\n")
    print(markdown([name, *(f"{100 * budget:g}%" for budget in BUDGETS)], rows(runs, key)))
    # What is predicted is of other text of the calibration's files, not of other files.
    ours = {
        method: [
            point for run in runs for point in run.get(method, {}).values() if "predicted" in point
        ]
        for method in OURS
    }
    held = {m: accuracy(points, f"{key} {AS_IT_RUNS}") for m, points in ours.items() if points}
    show_predictions(name, held, "other files")
    for method in (method for method in runs[0] if not method.startswith("ours")):
        chosen = (f"{100 * budget:g}%: {best(runs[0][method], budget, key)}" for budget in BUDGETS)
        print(f"\n{method}: {'; '.join(chosen)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Bits and ranks beside other methods, at equal bytes."
    )
    parser.add_argument("--models", nargs="+", choices=COMPARED, default=[*DECODERS, "minilm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--resume", action="store_true", help="keep what is there")
    options = parser.parse_args()
    for name in options.models:
        for seed in options.seeds:
            measure(name, seed, options.methods, resume=options.resume)
        show(name)


if __name__ == "__main__":
    main()
