"""What compression costs, side by side with other methods, at equal parameters (and bytes).

    python -m benchmarks.quality --models gpt llama --seeds 3

Two decoders with trained weights (``examples/``): 64 windows of text that they were not trained on
to calibrate with, other text to measure on. The loss rise is the KL to the dense model's prediction
in nats a token; the rise of the text's own cross-entropy is kept beside it. Each seed draws other
windows. ``benchmarks/peers.py`` says what the other methods are. Ours: one-shot factors,
refitted ones (no gradient steps), and polished ones, whose gradient steps take the time given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from benchmarks.peers import Peers, kl_distance
from benchmarks.record import keep
from examples import gpt, llama, stdlib_text
from examples.gpt import encode, load_tokenizer
from tensorize.passes import preserved
from tensorize.printer import table

BUDGETS = (0.1, 0.25, 0.5, 0.75)
MODELS: dict[str, Callable[[], Any]] = {
    "gpt": gpt.load_pretrained,
    "llama": llama.load_pretrained,
}
CONTEXT, WINDOWS, BATCH = 256, 64, 8
SENSED = 2  # batches on which the K-FAC SVD measures every weight at every level
OURS = {"ours, one-shot": None, "ours, refit": "refit", "ours, polish": "polish"}


@cache
def _windows(split: stdlib_text.Split, context: int) -> Tensor:
    """All of a split, as token ids (windows, context); what does not fill a window is left out."""
    texts = [document.text for document in stdlib_text.documents(split)]
    ids = encode(load_tokenizer(), texts)
    return ids[: len(ids) // context * context].view(-1, context)


def text(split: stdlib_text.Split, windows: int, context: int, seed: int = 0) -> Tensor:
    """Windows drawn from all files of a split, as token ids (windows, context)."""
    found = _windows(split, context)
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[drawn[:windows]]


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Cross-entropy of the next token, in nats, over windows (windows, context)."""
    total = 0.0
    for batch in ids.split(16):
        logits = model(batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(batch)
    return total / len(ids)


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    """KL of a model's prediction to the dense model's, in nats a token."""
    batches = ids.split(16)
    parts = (preserved.divergence(dense(batch).logits, model(batch).logits) for batch in batches)
    return float(sum(parts)) / ids.numel()


def compare(name: str, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Method → budget → its figures, for one model and one draw of calibration text."""
    model = MODELS[name]()
    calibration = list(text("validation", WINDOWS, CONTEXT, seed=seed).split(BATCH))
    unseen = text("held_out", WINDOWS, CONTEXT, seed=seed)
    began = time.perf_counter()
    ours = tensorize.analyze(
        model, calibration=calibration, refine="polish", seed=seed, progress=False
    )
    analysed = time.perf_counter() - began
    peers = Peers(
        model,
        tensorize.analyze(model, example_inputs=(calibration[0],), progress=False),
        tensorize.analyze(model, calibration=calibration, metric="input", progress=False),
        ours,
        kl_distance(model, calibration[:SENSED]),
    )
    plans: dict[str, Callable[[float], tensorize.Plan]] = dict(peers.plans())
    for method, refine in OURS.items():
        plans[method] = lambda budget, refine=refine: ours.plan(budget, refine=refine)
    dense = loss(model, unseen)
    found: dict[str, dict[str, dict[str, float]]] = {"dense": {"all": {"loss": dense}}}
    found["dense"]["all"]["seconds_of_analysis"] = analysed
    for method, plan_for in plans.items():
        for budget in BUDGETS:
            plan = plan_for(budget)
            began = time.perf_counter()
            small = tensorize.apply(model, plan, progress=False)
            figures = {
                "seconds": time.perf_counter() - began,
                "parameters": plan.predicted.parameters / plan.dense.parameters,
                "kl": divergence(small, model, unseen),
                "rise": loss(small, unseen) - dense,
            }
            if plan.predicted.loss is not None and plan.predicted.loss_interval is not None:
                low, high = plan.predicted.loss_interval
                figures |= {"predicted": plan.predicted.loss, "low": low, "high": high}
            found.setdefault(method, {})[str(budget)] = figures
            print(f"{name} {seed} {method:<14} {budget:<5} KL {figures['kl']:.5f}", flush=True)
    return found


def summary(runs: list[dict[str, dict[str, dict[str, float]]]], key: str) -> list[list[str]]:
    """A row a method: the median over seeds by budget, with the spread in brackets."""
    rows = []
    for method in runs[0]:
        if method == "dense":
            continue
        cells = []
        for budget in BUDGETS:
            values = [run[method][str(budget)][key] for run in runs]
            half = (max(values) - min(values)) / 2
            cells.append(f"{statistics.median(values):.3g}" + (f" ±{half:.1g}" if half else ""))
        rows.append([method, *cells])
    return rows


def ratios(runs: list[dict[str, dict[str, dict[str, float]]]], key: str) -> dict[str, float]:
    """Ours over the best of the others, the geometric mean over budgets from .25, by seed."""
    found = {}
    for method in OURS:
        logs = []
        for run in runs:
            peers = [m for m in run if m not in OURS and m != "dense"]
            for budget in ("0.25", "0.5", "0.75"):
                best = min(run[m][budget][key] for m in peers)
                logs.append(torch.tensor(run[method][budget][key] / best).clamp_min(1e-9).log())
        found[method] = float(torch.stack(logs).mean().exp())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.models:
        runs = [compare(name, seed) for seed in range(options.seeds)]
        results[name] = {"runs": runs}
        for key, title in (("kl", "KL to the dense model"), ("rise", "rise of the text's loss")):
            results[name][f"ratio_{key}"] = ratios(runs, key)
            print(f"\n{name}: {title}, nats a token; half the range over seeds")
            print(table(["method", *(f"{b:g} kept" for b in BUDGETS)], summary(runs, key)))
            for method, ratio in results[name][f"ratio_{key}"].items():
                print(f"{method}: {ratio:.2f} of the best other, .25 to .75")
        print(f"kept in {keep('quality', results)}")


if __name__ == "__main__":
    main()
