"""The compressed form of a decoder that writes drafts for it: speculative decoding."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.api.analysis import CURVE_BUDGETS, AnalysedPlan, Analysis, planned
from tensorize.api.analyze import analyzed
from tensorize.api.apply import apply_plan
from tensorize.api.options import Options
from tensorize.base import printer
from tensorize.base.errors import BudgetError, CaptureError
from tensorize.base.progress import Progress, shown
from tensorize.base.tensors import unwrapped
from tensorize.capture.forward import in_usual_modes
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.curves.precisions import PrecisionOption
from tensorize.passes.observe.select import Select
from tensorize.reports.attach import attach, report
from tensorize.running.in_use import use_kernels

MOST_TOKENS = 8
"""Tokens of a draft, at most."""

_CALLS = 7


@dataclass(frozen=True)
class Speculation:
    """What drafts are predicted to give: how often a token of theirs is accepted, how many are
    written at a time, and how many times as fast the text comes."""

    acceptance: float
    tokens: int
    speedup: float

    def __str__(self) -> str:
        return (
            f"as a draft: {printer.percent(self.acceptance)} of its tokens are predicted to be "
            f"accepted; {self.tokens} at a time make decoding {self.speedup:.2f} times as fast"
        )


def acceptance(kl: float) -> float:
    """The share of a draft's tokens that are accepted, for its KL in nats to the dense model.

    A token is accepted with probability 1 - TV. Where logits differ by Gaussian noise of a variance
    s² that is small, KL = s²/2 and TV = E|noise|/2 = s / √(2π), so TV = √(KL / π).
    """
    return max(0.0, 1 - math.sqrt(max(kl, 0.0) / math.pi))


def tokens_a_call(accepted: float, tokens: int) -> float:
    """Tokens that one call of the dense model gives: those of a draft up to the first that is not
    accepted, and one of its own (Leviathan et al. 2023)."""
    return sum(accepted**k for k in range(tokens + 1))


def best_speculation(
    kl: float, draft: float, dense: Sequence[float], most: int = MOST_TOKENS
) -> Speculation:
    """How many tokens a draft has best.

    Args:
        kl: of the draft to the dense model.
        draft: the time of one token of the draft.
        dense: times of 1, 2, ... ``most`` + 1 tokens in one call of the dense model.
    """
    accepted = acceptance(kl)

    def speedup(tokens: int) -> float:
        return tokens_a_call(accepted, tokens) * dense[0] / (tokens * draft + dense[tokens])

    tokens = max(range(1, most + 1), key=speedup)
    return Speculation(accepted, tokens, speedup(tokens))


@in_usual_modes("draft")
def draft(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | str,
    tokenizer: Any = None,
    budgets: Sequence[float] = CURVE_BUDGETS,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    precision: PrecisionOption = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """The compressed model that makes speculative decoding of the dense one fastest.

    The text is the dense model's own, whatever the draft writes. Which budget is best follows from
    how many tokens will be accepted, as predicted from the KL of each plan, and from times: those
    of the matmuls as predicted for this machine, and of all else as one call of the model shows.
    The report's notes say what is expected, and ``generation_config`` how many tokens a draft has.

    Args:
        model: a decoder of transformers, dense; it is left as it was.
        calibration, tokenizer: as for ``compile``; the data are needed.
        include, exclude, formats, precision, refine, seed: as for ``compile``.
        cache_dir, progress: as for ``compile``.
        budgets: shares among which to choose.

    Raises:
        BudgetError: no draft is predicted to make decoding faster.
        CaptureError, AnalysisError, CheckpointError: as ``compile``.

    Examples:
        >>> small = tensorize.draft(decoder, calibration=texts)
        >>> text = decoder.generate(ids, assistant_model=small)
    """
    options = Options.of({**locals(), "budget": min(budgets)})
    if not hasattr(unwrapped(model), "generation_config"):
        raise CaptureError(
            f"a {type(unwrapped(model)).__name__} does not generate text",
            way_out="pass a decoder of transformers",
        )
    with shown(options.progress) as tell:
        options = replace(options, progress=tell)
        analysis = analyzed(model, options)
        model = unwrapped(model)
        plan, found = _best(analysis, options, budgets, _call(model, analysis))
        small: Any = use_kernels(apply_plan(model, plan, analysis, options, tell), "auto")
    known = report(small)
    attach(small, replace(known, notes=(*known.notes, str(found))))
    generation: Any = copy.deepcopy(model.generation_config)
    generation.num_assistant_tokens = found.tokens
    generation.num_assistant_tokens_schedule = "constant"
    small.generation_config = generation
    return small


def _best(
    analysis: Analysis, options: Options, budgets: Sequence[float], call: float
) -> tuple[AnalysedPlan, Speculation]:
    """The plan of the fastest draft; ``call``: microseconds of one token in the dense model."""
    rows = tuple(range(1, MOST_TOKENS + 2))
    choices: list[tuple[AnalysedPlan, Speculation]] = []
    for budget in budgets:
        asked = replace(options, budget=budget, formats=None, batch_sizes=rows)
        try:
            plan = planned(analysis, asked)
        except BudgetError:
            continue
        kl, dense, own = plan.predicted.loss, plan.dense.latency, plan.predicted.latency
        assert kl is not None
        rest = max(call - dense[0], 0.0)
        times = [took + rest for took in dense]
        choices.append((plan, best_speculation(kl, own[0] + rest, times)))
    if not choices:
        raise BudgetError(f"none of the budgets {budgets} is feasible", way_out="larger ones")
    plan, found = max(choices, key=lambda choice: choice[1].speedup)
    if found.speedup <= 1:
        raise BudgetError(
            f"no draft is predicted to pay: the best, at {plan.budget}, makes decoding "
            f"{found.speedup:.2f} times as fast",
            way_out="decode without a draft; larger models spend more of their time in matmuls",
        )
    return plan, found


@torch.no_grad()
def _call(model: nn.Module, analysis: Analysis) -> float:
    """Microseconds that the dense model takes for one token, in the median."""
    batch = analysis.calibration[0]
    ids = next(filter(_is_tokens, (*batch.kwargs.values(), *batch.args)), None)
    if ids is None:
        raise CaptureError(
            "the calibration data are no tokens", way_out='batches {"input_ids": tokens}'
        )
    one, took = ids[:1, :1], []
    for _ in range(_CALLS):
        start = time.perf_counter()
        model(one)
        took.append(time.perf_counter() - start)
    return 1e6 * statistics.median(took)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype == torch.long
