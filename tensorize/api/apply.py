"""``tensorize.apply``: put a plan into effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.api.analysis import NO_REFIT, Analysis, analysis_of, keep_analysis
from tensorize.api.analyze import analyzed, calibration_of
from tensorize.api.autotune import time_orders
from tensorize.api.options import Options
from tensorize.api.outcome import outlook_of, report_of, slow_weights
from tensorize.base import timer
from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.base.progress import Progress, shown
from tensorize.base.tensors import unwrapped
from tensorize.cache import analyses as disk
from tensorize.capture.batches import ToInputs
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import check_model, check_module, find_inputs
from tensorize.hub.gathered import gathered, is_gathered
from tensorize.ir.plan import Plan
from tensorize.ir.precision import Precision
from tensorize.ir.sites import Batch, Site, Use
from tensorize.ir.spec import SHARED
from tensorize.passes.allocate.choices import check_choices
from tensorize.passes.beside.compare import CompareRuns
from tensorize.passes.beside.dense_reads import memory_of
from tensorize.passes.curves.side_by_side import shared_by_ranks
from tensorize.passes.observe.counted import CountRows
from tensorize.passes.observe.loss import LossOption, PreservedLoss, function_of, split
from tensorize.passes.observe.parts import in_parts
from tensorize.passes.pipeline import Pass, run_passes
from tensorize.passes.predict.rounded import Rounded
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.rewrite.norms import EstimateNorms, norms_of
from tensorize.passes.rewrite.pipeline import rewriting
from tensorize.passes.rewrite.polish import Polish
from tensorize.passes.stages import Opened, Planned, Rewritten
from tensorize.reports.attach import attach
from tensorize.reports.report import Report
from tensorize.reports.verdict import Outlook
from tensorize.store import transformers_config
from tensorize.store.fingerprint import fingerprint
from tensorize.weight.lazy import FactoredWeight


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    loss_fn: LossOption = None,
    refine: str | None = "auto",
    autotune: bool = False,
    inplace: bool = False,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Put a plan into effect: the mechanical stage.

    A plan from ``Analysis.plan`` carries its analysis. One read from JSON needs the cache that
    holds it, or ``calibration=`` to make it again; a plan of the weights alone needs neither.

    Args:
        example_inputs: what forward takes, where a plan from JSON was made with it.
        calibration, tokenizer, to_inputs: the data that the plan was made with, where it does not
            carry them itself.
        loss_fn: the loss that it was made for, likewise.
        refine: "auto" does what the plan predicts; anything else overrides it, and then the result
            is not what was predicted.
        autotune: time contraction orders on this machine, as ``compile`` does.

    Raises:
        AnalysisError: the plan was made for other weights or another loss, or its analysis or the
            data for its ``refine`` cannot be had.
        BudgetError: the plan keeps a limit on single errors, and ``refine`` moves them.
        CaptureError: ``model`` is none, or the inputs do not fit it.

    Examples:
        >>> plan = tensorize.analyze(dense, example_inputs=inputs).plan(0.5)
        >>> type(tensorize.apply(dense, plan)) is type(dense)
        True
    """
    return applied(model, plan, Options.of(locals()))


@in_usual_modes("apply")
def applied(model: nn.Module, plan: Plan, options: Options) -> nn.Module:
    """``apply`` with its options as one record."""
    inner = unwrapped(check_module(model))
    if not is_gathered(inner):
        return _applied_together(inner, plan, options)
    model = check_model(model, inplace=options.inplace)
    if not isinstance(plan, Plan):
        raise AnalysisError(
            f"plan is a {type(plan).__name__}, not a Plan",
            way_out="tensorize.apply(model, analysis.plan(0.5))",
        )
    options.check_errors_stay(plan.limits_errors)
    analysis, options = analysis_of(plan), replace(options, seed=plan.seed)
    batches, _ = calibration_of(model, options)
    if options.refine != "auto":
        notes = tuple(note for note in plan.notes if not note.startswith(NO_REFIT))
        plan = replace(plan, refine=options.refine, notes=notes)
    _check_loss(plan, options.loss_fn)
    if fingerprint(model.named_parameters()) != plan.fingerprint:
        raise AnalysisError(
            "the plan was made for a model with other weights",
            way_out="analyse this model: tensorize.analyze(model)",
        )
    with shown(options.progress) as tell:
        if analysis is None:
            analysis = _analysis_of(model, plan, batches, replace(options, progress=tell))
        if batches and not analysis.calibration:
            analysis = replace(analysis, calibration=in_parts(model, batches)[0])
        if plan.refine is not None and not analysis.calibration:
            raise AnalysisError(
                f"the plan's refine={plan.refine!r} needs the calibration data, which a cache and "
                "JSON do not hold",
                way_out="pass calibration=, or refine=None",
            )
        check_choices(plan, analysis.program, model)
        return apply_plan(model, plan, analysis, options, tell)


def _applied_together(model: nn.Module, plan: Plan, options: Options) -> nn.Module:
    """A sharded model compressed, whole on every process, each making its share of the factors."""
    if options.inplace:
        raise CaptureError(
            "a sharded model is not compressed in place: the result is whole on every process",
            way_out="inplace=False, and tensorize.distributed.parallelize(small, mesh)",
        )
    with shared_by_ranks(next(model.parameters()).device):
        return applied(gathered(model), plan, replace(options, inplace=True))


def _check_loss(plan: Plan, loss_fn: LossOption) -> None:
    """Raises AnalysisError where a plan cannot be carried out for the loss that it was made for."""
    if loss_fn is not None and not plan.own_loss:
        raise AnalysisError("the plan was made without a loss_fn", way_out="analyse with loss_fn=")
    if plan.own_loss and analysis_of(plan) is None and loss_fn is None:
        raise AnalysisError(
            "the plan was made for a loss_fn, which JSON does not hold",
            way_out="pass the same loss_fn= again",
        )


def _analysis_of(
    model: nn.Module, plan: Plan, batches: tuple[Batch, ...], options: Options
) -> Analysis:
    """The analysis that a plan was made of, which it does not carry: kept, or made again."""
    if plan.cache is not None and (found := disk.read(plan.cache)) is not None:
        return Analysis(found, plan.fingerprint, plan.cache)
    if plan.metric != "frobenius" and not batches:
        raise AnalysisError(
            f"the plan was made in the {plan.metric} metric and its analysis is not at hand",
            way_out='pass calibration= (data, or "self"), or analyse with cache_dir= so that the '
            "plan finds it",
        )
    formats = {
        site.name: site.format if site.shared is None else (site.format, SHARED)
        for site in plan.sites
        if site.spec is not None
    }
    data = None if plan.metric == "frobenius" else [batch.given for batch in batches]
    made: dict[str, Any] = {"metric": plan.metric, "refine": plan.refine, "calibration": data}
    return analyzed(model, replace(options, formats=formats or None, **made))


def apply_plan(
    model: nn.Module, plan: Plan, analysis: Analysis, options: Options, tell: Progress
) -> nn.Module:
    """The model with the factors of a plan that was made for it, and with its report."""
    replaced = {site.name for site in plan.sites if site.spec is not None}
    batch, _ = find_inputs(model, options.example_inputs, analysis.calibration)
    weights = {name: p for name, p in model.named_parameters() if name in replaced}
    compare = CompareRuns(batch, memory_of(weights))
    del weights
    target = model if options.inplace else copy_sharing(model, replaced)
    planned = analysis.program.to(Planned, plan=plan.alone, progress=tell)

    @functools.cache
    def beside() -> tuple[Any, ...]:
        dense = copy_sharing(model, dict(model.named_parameters())) if options.inplace else model
        loss = PreservedLoss.fit(dense, analysis.calibration, analysis.loss_fn)
        return dense, *split(analysis.calibration), loss

    outlook = outlook_of(plan, analysis, _bits_of(model, analysis))
    refine = plan.refine if replaced else None
    passes: tuple[Pass[Any, Any], ...] = (
        *rewriting(refine, analysis.calibration, lambda: Polish(*beside())),
        *([EstimateNorms(*beside())] if refine is not None and norms_of(model) else []),
        compare,
    )
    if refine is not None and planned.counted is None:
        passes = CountRows(analysis.calibration, function_of(analysis.loss_fn)), *passes
    done = run_passes(planned.to(Opened, model=target), passes, Rewritten)
    if options.autotune:
        time_orders(done)
    attach(target, report_of_result(done, analysis, outlook))
    if plan.predicted.file is not None:
        keep_analysis(target, analysis)
    transformers_config.note_factors(target)
    return target


def _bits_of(model: nn.Module, analysis: Analysis) -> Callable[[Precision], float] | None:
    """What the dense model, as it is now, loses with fewer bits, on batches that are held out."""
    sites, batches = analysis.program.free, split(analysis.calibration)[1]
    if not batches or any(site.reals > 1 for site in sites):  # complex numbers are no integers
        return None

    @functools.cache
    def rounded() -> Rounded:
        loss = PreservedLoss.fit(model, analysis.calibration, analysis.loss_fn)
        return Rounded(model, sites, batches, loss)

    return lambda precision: rounded().loses(precision)


def report_of_result(done: Rewritten, analysis: Analysis, outlook: Outlook) -> Report:
    return report_of(done, analysis.curve(), slow_weights(done, _timed), outlook)


@torch.no_grad()
def _timed(factors: FactoredWeight, site: Site, rows: int) -> tuple[float, float]:
    """Microseconds of all uses of a factorized weight and of the dense one, for random rows."""
    dense = factors.dense()
    generator = torch.Generator().manual_seed(0)

    def call(use: Use, weight: Any) -> Callable[[], Tensor]:
        if use.contract == "lookup":
            ids = torch.randint(dense.shape[0], (rows,), generator=generator).to(dense.device)
            return lambda: F.embedding(ids, weight)
        rows_meet = dense.shape[0] if use.contract == "rows" else dense.shape[1]
        x = torch.randn(rows, rows_meet, generator=generator).to(dense)
        if use.contract == "rows":
            return lambda: torch.matmul(x, weight)
        if use.contract == "whole" and weight is factors:
            return lambda: F.linear(x, factors.dense())
        return lambda: F.linear(x, weight)

    def took(weight: Any) -> float:
        calls = [call(use, weight) for use in site.uses]
        return sum(1e6 * timer.seconds_of(each, str(dense.device)) for each in calls)

    return took(factors), took(dense)
