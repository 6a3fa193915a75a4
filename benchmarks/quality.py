"""Loss of a trained GPT after compression: metrics and allocations side by side, equal parameters.

    python -m benchmarks.quality

The GPT of ``examples/``, compressed without any gradient step, with 16 k tokens of calibration text
that it was not trained on; the rise of the loss on held-out text, in nats a token. "Uniform" gives
every weight the same share of its parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep
from examples import stdlib_text
from examples.gpt import GPT, encode, load_pretrained, load_tokenizer
from tensorize import Analysis, Plan
from tensorize.printer import table

BUDGETS = (0.1, 0.25, 0.5, 0.75)


def text(split: stdlib_text.Split, windows: int, context: int) -> Tensor:
    """The first ``windows`` windows of a split, as token ids (windows, context)."""
    tokenizer = load_tokenizer()
    parts: list[Tensor] = []
    for document in stdlib_text.documents(split):
        parts.append(encode(tokenizer, [document.text]))
        if sum(part.numel() for part in parts) >= windows * context:
            break
    return torch.cat(parts)[: windows * context].view(-1, context)


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Cross-entropy of the next token, in nats, over windows (windows, context)."""
    total = 0.0
    for batch in ids.split(16):
        logits = model(batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(batch)
    return total / len(ids)


def uniform_plan(analysis: Analysis, model: nn.Module, budget: float) -> Plan:
    """The same share of parameters for every weight, low rank, at most ``budget`` in all."""
    sites = [site for site in analysis.program.sites if site.blocked is None]
    whole = sum(p.numel() for p in model.parameters())
    fixed = whole - sum(site.parameters for site in sites)
    share = (budget * whole - fixed) / (whole - fixed)
    ranks = {}
    for site in sites:
        m, n = site.matrix
        ranks[site.name] = max(1, int(share * m * n / (m + n)))
    return analysis.plan(None, ranks=ranks)


def rises(model: GPT, calibration: list[Tensor], held_out: Tensor) -> dict[str, dict[str, float]]:
    """Method → budget → rise of the held-out loss."""
    dense = loss(model, held_out)
    analyses = {
        "SVD": tensorize.analyze(model, example_inputs=(held_out[:1],), progress=False),
        "input-aware": tensorize.analyze(
            model, calibration=calibration, metric="input", progress=False
        ),
        "two-sided": tensorize.analyze(model, calibration=calibration, progress=False),
    }
    found: dict[str, dict[str, float]] = {}
    for budget in BUDGETS:
        for name, analysis in analyses.items():
            uniform = uniform_plan(analysis, model, budget)
            equal = tensorize.Budget(params=uniform.predicted.parameters)
            plans = {f"{name}, uniform": uniform, f"{name}, global": analysis.plan(equal)}
            for method, plan in plans.items():
                small = tensorize.apply(model, plan, progress=False)
                found.setdefault(method, {})[str(budget)] = loss(small, held_out) - dense
    return {"dense": {"loss": dense}, **found}


def main() -> None:
    torch.manual_seed(0)
    model = load_pretrained().eval()
    context = model.config.context
    calibration = list(text("validation", 64, context).split(8))
    found = rises(model, calibration, text("held_out", 64, context))
    rows = [
        [method, *(f"{by_budget[str(b)]:.4f}" for b in BUDGETS)]
        for method, by_budget in found.items()
        if method != "dense"
    ]
    print(f"dense: {found['dense']['loss']:.4f} nats a token; rise of the held-out loss")
    print(table(["method", *(f"{100 * b:g} % kept" for b in BUDGETS)], rows))
    print(f"kept in {keep('quality', found)}")


if __name__ == "__main__":
    main()
