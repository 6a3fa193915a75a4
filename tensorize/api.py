"""The driver: from a dense model to a compressed one. The only file that knows passes and codegen.

``analyze`` → ``Analysis.plan`` → ``apply`` are the three stages; ``compile`` is all of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorize import cache as disk
from tensorize import capture, checkpoint, hooks, huggingface, ops, shards, streaming, weight
from tensorize.analysis import (
    Analysis,
    check_choice,
    check_errors_stay,
    check_refine,
    fingerprint,
)
from tensorize.budget import Budget, parse_bytes
from tensorize.codegen import aten, machine, orders, training
from tensorize.errors import AnalysisError, CheckpointError, ModelError, check_one_of
from tensorize.forward import in_usual_modes, out_of_memory
from tensorize.graphs import Graphs
from tensorize.ir import (
    BLOCK,
    DENSE,
    POLISH,
    REFIT,
    SHARED,
    TT,
    Batch,
    ContractionPlan,
    Machine,
    Plan,
    Tree,
    TTSpec,
)
from tensorize.lazy import FactoredWeight
from tensorize.outcome import report_of, slow_weights
from tensorize.passes.allocate import RanksOption
from tensorize.passes.factorize import Factorize, copy_sharing
from tensorize.passes.in_groups import LearnInGroups
from tensorize.passes.measured import MeasureLargest
from tensorize.passes.pipeline import Pass, Program, debug_level, run_passes
from tensorize.passes.polish import Polish
from tensorize.passes.predict import CalibratePrediction
from tensorize.passes.preserved import LossFunction, PreservedLoss, split
from tensorize.passes.refit import Refit
from tensorize.passes.sites import (
    FindSites,
    Select,
    check_weights,
    named_parameters,
    require_match,
)
from tensorize.passes.spectra import ComputeSpectra, FormatsOption, formats_by_site
from tensorize.passes.statistics import CollectStatistics
from tensorize.passes.timed import BREAKPOINTS, common_breakpoints, contenders, timed_plan
from tensorize.passes.training import plan_training
from tensorize.passes.verify import VerifyResult
from tensorize.progress import Progress, announce, shown
from tensorize.report import Report, attach, detach, report
from tensorize.runtime import device_of, use_kernels
from tensorize.selfmade import affordable, self_made
from tensorize.tensors import unwrapped
from tensorize.version import __version__

log = logging.getLogger("tensorize")

METRICS = ("frobenius", "input", "loss")
BACKENDS = ("auto", "aten", "triton", "inductor")
SELF = "self"


class _Contractions:
    """Contractions in the fastest order that the machine's figures predict, as torch operations."""

    def contraction(self, asked: ops.Asked) -> ops.Contraction:
        return aten.build(self._plan(asked))

    def training(
        self, asked: ops.Asked, gradients: tuple[int | str, ...], memory_limit: int | None
    ) -> ops.Trained:
        plan = plan_training(
            asked.spec,
            asked.contract,
            gradients=gradients,
            memory_limit=memory_limit,
            forward=self._plan(asked),
        )
        return training.build(plan)

    def _plan(self, asked: ops.Asked) -> ContractionPlan:
        return timed_plan(
            asked.spec,
            asked.contract,
            machine.current(asked.device),
            BREAKPOINTS if asked.breakpoints is None else asked.breakpoints,
            asked.dtype,
            orders.known(asked.device),
        )

    def breakpoints(self, uses: Sequence[tuple[TTSpec, str]], device: str) -> tuple[int, ...]:
        sides = [(s, contract, dtype) for s, dtype in uses for contract in ("columns", "rows")]
        return common_breakpoints(sides, machine.current(device))


ops.register_backend(_Contractions())
# Other libraries learn of factorized models as soon as they are imported themselves.
hooks.when_imported("transformers.quantizers.auto", "tensorize.pretrained")
hooks.when_imported("peft.tuners.lora.model", "tensorize.lora")


@in_usual_modes
def compile(
    model: nn.Module,
    budget: float | Budget | None = 0.1,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    loss_fn: LossFunction | None = None,
    metric: str | None = None,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    ranks: RanksOption = None,
    backend: str = "auto",
    autotune: bool = False,
    inplace: bool = False,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """The same model, smaller: matmul weights replaced by low-rank or tensor-train factors.

    Args:
        model: a dense module; it is left bit for bit as it was (``inplace=True``: it is rewritten
            itself, each dense weight released as soon as its cores exist).
        budget: the share of the model's parameters to keep, in (0, 1], or a ``tensorize.Budget``;
            ``None`` where ``ranks`` says it all.
        example_inputs: what forward takes: a tuple of positional or a dict of keyword arguments.
        calibration: an iterable of such inputs, or of strings with ``tokenizer=``: the errors are
            then weighed by what they do to the model's outputs. ``"self"``: the model makes them
            itself, a decoder by writing text. None: it makes some where that takes no more than
            about a minute, else the weights alone are judged (as by ``metric="frobenius"``).
        loss_fn: ``loss_fn(outputs, batch) -> scalar`` to preserve instead of the outputs.
        metric: force ``"frobenius"``, ``"input"`` or ``"loss"``.
        refine: what is done to the factors with the calibration data: None, ``"refit"`` (solved
            again, in closed form, for the inputs of the compressed model) or ``"polish"`` (gradient
            steps on the distance to the dense outputs as well); "auto" is a refit.
        include, exclude: shell patterns over parameter and module names, or a predicate on sites.
        formats: which of ``"dense"``, ``"low_rank"``, ``"shared"`` (low rank with one first factor
            for weights of one input), ``"tt"`` and ``"block"`` may be used: a name, several, or
            pattern → names. By default the first three, and trains of weights that a cheap probe
            finds to be sums of a few Kronecker products.
        ranks: pattern → rank or ``"full"``; overrides the allocation.
        backend: ``"aten"``: contractions run as torch operations. ``"triton"``: as kernels wherever
            a family covers them, on a GPU or, with ``TRITON_INTERPRET=1``, on the CPU. ``"auto"``:
            as kernels where they were measured to beat torch on this GPU (``tune_kernels``).
            ``"inductor"``: the model's own call is compiled, at its first use, as by
            ``torch.compile(model, backend="tensorize")``.
        autotune: time the best few contraction orders of every tensor train on this machine, and
            remember the fastest (in ``~/.cache/tensorize``). No choice rests on a timing otherwise.
        seed: of the probes; same seed, same inputs, same machine: the same bits.
        cache_dir: where analyses are kept on disk, a weight at a time: a run that was killed goes
            on after the last one. None: nowhere.
        max_memory: bytes, or text such as ``"4GB"``: the most that second moments may take at once.
            Weights are then analysed in groups, each in passes over the calibration data of its
            own, and what is learned lies on disk; the bits are the same. The model and its
            forward and backward passes are not counted.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        BudgetError: the budget is malformed or not feasible (it names the nearest that is).
        CaptureError: the model or its inputs cannot be used.
        AnalysisError: weights or options do not allow an analysis.
        CheckpointError: ``cache_dir`` cannot be used.
        TensorizeError: ``backend`` is unknown.
    """
    budget = None if budget is None else Budget.of(budget)
    check_choice(budget, refine, ranks)
    if ranks is not None:
        capture.check_model(model)
        require_match(named_parameters(model), list(ranks), "ranks")
    check_one_of("backend", backend, BACKENDS)
    with shown(progress) as tell:
        analysis = analyze(
            model,
            example_inputs=example_inputs,
            calibration=calibration,
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            metric=metric,
            refine=refine,
            include=include,
            exclude=exclude,
            formats=formats,
            seed=seed,
            cache_dir=cache_dir,
            max_memory=max_memory,
            progress=tell,
        )
        plan = analysis.plan(budget, refine=refine, ranks=ranks)
        small = _apply(model, plan, analysis, inplace, tell, autotune)
        return use_kernels(small, backend)


@in_usual_modes
def analyze(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    loss_fn: LossFunction | None = None,
    metric: str | None = None,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> Analysis:
    """Learn, once, what every rank of every weight costs; the arguments are those of ``compile``.

    Args:
        refine: what plans may ask for, and its gain is to be measured: ``"polish"`` takes longest.

    Raises:
        CaptureError: the model, the example inputs or a calibration batch (it says which) do not
            fit.
        AnalysisError: a weight is not finite, a pattern matches nothing, a metric lacks its data.
        BudgetError: ``max_memory`` is no number of bytes.
        CheckpointError: ``cache_dir`` cannot be used.
    """
    most = parse_bytes(max_memory)
    if cache_dir is not None:
        disk.prepare(cache_dir)
    capture.check_model(model)
    check_weights(model)
    check_refine(refine)
    batches, made = _calibration(calibration, model, example_inputs, seed, tokenizer)
    unasked = calibration is None and metric is None and loss_fn is None
    metric = _metric(metric, batches, loss_fn)
    inputs, source = capture.find_inputs(model, example_inputs, batches)
    program = Program(
        model=model,
        inputs=inputs,
        calibration=batches,
        metric=metric,
        seed=seed,
        machine=figures(model),
        notes=(f"uses of the weights were seen with {source}", *made),
    )
    identity = fingerprint(model)
    with shown(progress) as tell:
        program = replace(program, progress=tell)
        program = run_passes(program, (FindSites(include, exclude),))
        # A format that is none is said before the expensive stage.
        formats_by_site([site for site in program.sites if site.blocked is None], formats)
        kept = _Kept(identity, cache_dir, most, loss_fn, formats, refine)
        return _learned_unasked(program, kept) if unasked else _learned(program, kept)


@dataclass(frozen=True)
class _Kept:
    """Of an analysis: which model's, the options that it depends on, and where it is kept."""

    identity: str
    cache_dir: str | os.PathLike[str] | None
    max_bytes: int | None
    loss_fn: LossFunction | None
    formats: FormatsOption
    refine: str | None

    def base(self, program: Program) -> str | None:
        """Where it is kept; None where it is not."""
        if self.cache_dir is None:
            return None
        options = self.formats, self.loss_fn, self.refine
        key = disk.key(program, self.identity, *options, __version__)
        return None if key is None else disk.location(self.cache_dir, key)


def _learned(program: Program, kept: _Kept) -> Analysis:
    """The analysis of a program: from the cache, or made and kept there."""
    base = kept.base(program)
    held = disk.Held.memory if kept.max_bytes is None else disk.Held.mapped
    if base is not None and (found := disk.read(base, program, held)) is not None:
        found = replace(found, machine=program.machine)
        return Analysis(found, kept.identity, base, program.calibration, kept.loss_fn)
    announce(_cost(program))
    with contextlib.ExitStack() as stack:
        curves = None if base is None else disk.Curves(Path(base), held)
        if curves is None and kept.max_bytes is not None:
            spilled = tempfile.TemporaryDirectory(prefix="tensorize-", ignore_cleanup_errors=True)
            # What is mapped of its files stays when they are gone.
            curves = disk.Curves(Path(stack.enter_context(spilled)), held)
        released = run_passes(program, _analysis_passes(program, kept, curves)).without_model()
        if base is not None and curves is not None:
            disk.write(base, curves, released)
    return Analysis(released, kept.identity, base, program.calibration, kept.loss_fn)


def figures(model: nn.Module) -> Machine:
    """Those of the machine that a model is on."""
    return machine.current(device_of(model))


def _of_itself(calibration: Any) -> bool:
    """Whether the model makes its calibration data; an array would answer ``==`` by entries."""
    return isinstance(calibration, str) and calibration == SELF


def _calibration(
    calibration: Any, model: nn.Module, example_inputs: Any, seed: int, tokenizer: Any = None
) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """The calibration batches, and a note where the model made them itself."""
    if calibration is None:
        return (), ()
    if not _of_itself(calibration):
        return capture.calibration_batches(calibration, model, tokenizer), ()
    inputs, _ = capture.find_inputs(model, example_inputs, ())
    batches, what = self_made(model, inputs, seed)
    return batches, (f"calibrated on {what}",)


def _learned_unasked(program: Program, kept: _Kept) -> Analysis:
    """The analysis on calibration data that the model makes unasked, where that costs little.

    It is one of the weights alone, with a note, where the model fails on such data or memory runs
    out: nobody asked for this. No other error leads there.
    """
    if program.inputs is None:
        why = "as no inputs are known that it runs on"
    elif (share := affordable(program.sites, program.inputs)) == 0:
        why = 'as its statistics take long or much memory; calibration="self" takes them'
    else:
        try:
            batches, what = self_made(program.model, program.inputs, program.seed, share)
            own = _noted(program, f"no calibration data: calibrated on {what}")
            return _learned(replace(own, calibration=batches, metric="loss"), kept)
        except (ModelError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ModelError) or out_of_memory(error)):
                raise
            what = "memory ran out" if out_of_memory(error) else "the model failed"
            said = str(error).partition("\n")[0]
            why = f"as {what} on data of its own ({type(error).__name__}: {said})"
    # Here nothing holds what the error's frames held any more.
    return _learned(_noted(program, f"no calibration data: weights alone, {why}"), kept)


def _noted(program: Program, note: str) -> Program:
    return replace(program, notes=(*program.notes, note))


def _analysis_passes(program: Program, kept: _Kept, curves: disk.Curves | None) -> tuple[Pass, ...]:
    """The expensive passes, in order."""
    learnt, held_out = split(program.calibration)
    loss = None
    if program.metric == "loss":
        loss = PreservedLoss.fit(program.model, program.calibration, kept.loss_fn)
    refinements = {None: (), POLISH: (REFIT, POLISH)}.get(kept.refine, (REFIT,))
    statistics, spectra = CollectStatistics(learnt, loss), ComputeSpectra(kept.formats)
    largest = MeasureLargest(program.calibration, loss)
    prediction = CalibratePrediction(learnt, held_out, loss, refinements)
    if curves is None:
        return statistics, spectra, largest, prediction
    stored = replace(spectra, store=curves)
    return LearnInGroups(statistics, stored, kept.max_bytes), largest, prediction


def _metric(metric: str | None, batches: tuple[Batch, ...], loss_fn: Any) -> str:
    if metric is None:
        metric = "loss" if batches else "frobenius"
    check_one_of("metric", metric, METRICS, AnalysisError)
    if metric != "frobenius" and not batches:
        raise AnalysisError(
            f"metric={metric!r} needs calibration data", way_out="pass calibration="
        )
    if loss_fn is not None and not batches:
        raise AnalysisError("loss_fn needs calibration data", way_out="pass calibration=")
    return metric


def _cost(program: Program) -> str:
    """One line: what the analysis will do, and roughly for how long."""
    free = [site for site in program.sites if site.blocked is None]
    flops = 0.0
    for site in free:
        m, n = site.matrix
        k = min(m, n)
        flops += (4 * m * n * k + 12 * k**3) * max(site.experts, 1)
    rate = 2e10 * max(torch.get_num_threads(), 1)  # float64 matrix work, a cautious figure
    seconds = flops / rate
    data = f", {len(program.calibration)} calibration batches" if program.calibration else ""
    return (
        f"analysing {len(free)} weights ({sum(s.parameters for s in free) / 1e6:.1f} M "
        f"parameters{data}): roughly {max(seconds, 1):.0f} s of decompositions"
    )


@in_usual_modes
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    loss_fn: LossFunction | None = None,
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
        calibration, tokenizer: the data that the plan was made with, where it does not carry them
            itself.
        loss_fn: the loss that it was made for, likewise.
        refine: "auto" does what the plan predicts; anything else overrides it, and then the result
            is not what was predicted.
        autotune: time contraction orders on this machine, as ``compile`` does.

    Raises:
        AnalysisError: the plan was made for other weights or another loss, or its analysis or the
            data for its ``refine`` cannot be had.
        BudgetError: the plan keeps a limit on single errors, and ``refine`` moves them.
        CaptureError: ``model`` is none, or the inputs do not fit it.
    """
    capture.check_model(model)
    if not isinstance(plan, Plan):
        raise AnalysisError(
            f"plan is a {type(plan).__name__}, not a Plan",
            way_out="tensorize.apply(model, analysis.plan(0.5))",
        )
    check_refine(refine)
    check_errors_stay(plan.limits_errors, refine)
    analysis = plan.analysis
    batches, _ = _calibration(calibration, model, None, plan.seed, tokenizer)
    if refine != "auto":
        plan = replace(plan, refine=refine)
    _check_loss(plan, loss_fn)
    with shown(progress) as tell:
        if analysis is None:
            analysis = _analysis_of(model, plan, example_inputs, batches, loss_fn, tell)
        if batches and not analysis.calibration:
            analysis = replace(analysis, calibration=batches)
        if plan.refine is not None and not analysis.calibration:
            raise AnalysisError(
                f"the plan's refine={plan.refine!r} needs the calibration data, which a cache and "
                "JSON do not hold",
                way_out="pass calibration=, or refine=None",
            )
        return _apply(model, plan, analysis, inplace, tell, autotune)


def _check_loss(plan: Plan, loss_fn: LossFunction | None) -> None:
    """Raises AnalysisError where a plan cannot be carried out for the loss that it was made for."""
    if loss_fn is not None and not plan.own_loss:
        raise AnalysisError("the plan was made without a loss_fn", way_out="analyse with loss_fn=")
    if plan.own_loss and plan.analysis is None and loss_fn is None:
        raise AnalysisError(
            "the plan was made for a loss_fn, which JSON does not hold",
            way_out="pass the same loss_fn= again",
        )


def _analysis_of(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    batches: tuple[Batch, ...],
    loss_fn: LossFunction | None,
    tell: Progress,
) -> Analysis:
    if plan.cache is not None and (found := disk.read_location(plan.cache)) is not None:
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
    return analyze(
        model,
        example_inputs=example_inputs,
        calibration=None if plan.metric == "frobenius" else [batch.given for batch in batches],
        loss_fn=loss_fn,
        metric=plan.metric,
        refine=plan.refine,
        formats=formats or None,
        seed=plan.seed,
        progress=tell,
    )


def _time_orders(program: Program) -> None:
    """Time the best few orders of every train of a model, keep the fastest, and use them."""
    contracts = {
        site.name: {use.contract for use in site.uses if use.contract in ("columns", "rows")}
        for site in program.sites
    }
    device, found = device_of(program.model), {}
    breakpoints = weight.breakpoints(program.model)
    asked = {
        ops.Asked(w.spec, contract, device, ops.multiplied_in(w.dtype, device), breakpoints)
        for name, w in weight.factored(program.model)
        for contract in contracts.get(name, ())
        if w.spec.format in (TT, BLOCK)
    }
    for done, each in enumerate(sorted(asked, key=str)):
        program.progress("timing orders", done, len(asked))
        found |= fastest_orders(each)
    program.progress("timing orders", len(asked), len(asked))
    orders.remember(found, device)
    ops.contractions.cache_clear()
    weight.settle(program.model)


def fastest_orders(asked: ops.Asked) -> dict[str, tuple[Tree, int]]:
    """For each range of rows the fastest of the best few orders and its layout, by what is asked
    for where they are kept."""
    rates = machine.current(asked.device)
    tried = contenders(asked.spec, asked.contract, rates, asked.breakpoints, asked.dtype)
    found = {}
    dtype = getattr(torch, asked.dtype)
    for question, batches, plans in tried:
        (best,) = orders.fastest(plans, batches, dtype, asked.device).pieces
        found[question] = best.tree, best.layout
    return found


def _apply(
    model: nn.Module,
    plan: Plan,
    analysis: Analysis,
    inplace: bool,
    tell: Progress,
    autotune: bool,
) -> nn.Module:
    if fingerprint(model) != plan.fingerprint:
        raise AnalysisError(
            "the plan was made for a model with other weights",
            way_out="analyse this model: tensorize.analyze(model)",
        )
    replaced = {site.name for site in plan.sites if site.spec is not None}
    target = model if inplace else copy_sharing(model, replaced)
    program = replace(analysis.program, model=target, plan=plan, progress=tell)
    passes: list[Pass] = [Factorize(), VerifyResult()]
    if plan.refine is not None and replaced:
        passes.insert(0, Refit(analysis.calibration))
    if plan.refine == POLISH and replaced:
        dense = copy_sharing(model, dict(model.named_parameters())) if inplace else model
        loss = PreservedLoss.fit(dense, analysis.calibration, analysis.loss_fn)
        passes.insert(2, Polish(dense, *split(analysis.calibration), loss))
    program = run_passes(program, passes)
    if autotune:
        _time_orders(program)
    attach(target, _report(program, analysis))
    huggingface.note_factors(target)
    return target


def _report(program: Program, analysis: Analysis) -> Report:
    return report_of(program, analysis.curve(), slow_weights(program, _timed))


@torch.no_grad()
def _timed(factors: FactoredWeight, rows: int) -> tuple[float, float]:
    """Microseconds of a factorized weight and of the dense one, for rows of random numbers."""
    dense = factors.dense()
    x = torch.randn(rows, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(dense)
    device = str(dense.device)
    calls = (factors, dense)
    ours, own = (
        1e6 * machine.seconds_of(lambda w=w: torch.nn.functional.linear(x, w), device)  # type: ignore[arg-type]
        for w in calls
    )
    return ours, own


# ------------------------------------------------------------------------------------ streaming


@in_usual_modes
def compile_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    budget: float | Budget | None = 0.1,
    *,
    metric: str | None = None,
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    ranks: RanksOption = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Compress a Hugging Face checkpoint that is never loaded: one weight at a time is in memory.

    ``out`` then holds what ``save(compile(model, budget, metric="frobenius"), out)`` would write.
    Weights are judged by themselves. What is finished lies on disk at once: called again after it
    was killed, with the same checkpoint and options, it goes on after the last weight.

    Args:
        directory: ``config.json`` and safetensors, in shards or in one file.
        out: where the result goes; until it is complete, a folder in it keeps what is finished.
        budget, include, exclude, formats, ranks, seed, progress: as in ``compile``.
        metric: ``"frobenius"``, the only one that needs nothing but one weight at a time.
        device: where decompositions run; None: a GPU where there is one, else the CPU.
        cache_dir: keep what is learned here, for other budgets, and not in ``out``.

    Returns:
        The report of the result; ``load(out)`` gives the model.

    Raises:
        BudgetError: the budget is malformed or not feasible.
        CaptureError: the directory is no checkpoint that can be read a tensor at a time.
        AnalysisError: weights or options do not allow an analysis, or the metric does not stream.
        CheckpointError: ``out`` or ``cache_dir`` cannot be written, or ``out`` holds a dense
            checkpoint.
    """
    limits = None if budget is None else Budget.of(budget)
    streaming.check_metric(metric)
    directory, out = Path(directory), Path(out)
    if directory.is_dir() and out.is_dir() and out.samefile(directory):
        raise CheckpointError(
            f"{out} is the checkpoint's own directory", way_out="choose another directory"
        )
    huggingface.check_place(out)
    if cache_dir is not None:
        disk.prepare(cache_dir)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = shards.open_checkpoint(directory)
    running = source.model
    inputs, seen = capture.find_inputs(running, None, ())
    if inputs is None and shards.CAN_BE_WITHOUT_MEMORY:
        running = shards.without_memory(source.model)
        inputs, seen = capture.find_inputs(running, None, ())
    program = Program(
        model=running,
        inputs=inputs,
        seed=seed,
        machine=machine.current(str(where)),
        notes=(f"uses of the weights were seen with {seen}", *source.notes),
    )
    with shown(progress) as tell, streaming.workplace(out) as folder:
        identity = source.fingerprint(partial(tell, "reading"))
        program = run_passes(replace(program, progress=tell), (FindSites(include, exclude),))
        program = replace(program, model=source.model)
        kept = _Kept(
            identity, folder if cache_dir is None else cache_dir, None, None, formats, None
        )
        base = kept.base(program)
        assert base is not None
        curves = disk.Curves(Path(base), disk.Held.shapes)
        announce(_cost(program))
        spectra = ComputeSpectra(formats, lambda name: source.read(name).to(where), curves)
        program = run_passes(program, (spectra,))
        analysis = Analysis(program.without_model(), identity)
        plan = analysis.plan(limits, refine=None, ranks=ranks)
        program = replace(program, plan=plan)
        write = streaming.WriteFactors(source, curves, folder)
        program = run_passes(program, (write, VerifyResult()))
        report = _report(program, analysis)
        write.artefact(program).save(program.model, report, out)
        shutil.rmtree(folder, ignore_errors=True)
    return report


# ----------------------------------------------------------------------------- looking at a result


def densify(model: nn.Module) -> nn.Module:
    """A copy of a compiled model with plain dense modules, holding the reconstructed weights.

    Raises:
        TensorizeError: a weight stands for no matrix (there is a function between its factors).
    """
    capture.check_model(model)
    model = unwrapped(model)
    for name, factored in weight.factored(model):
        factored.require_matrix(name)
    dense = copy.deepcopy(model)
    detach(dense)

    def build(factored: FactoredWeight) -> nn.Parameter:
        # Rebuilt in float64, so that the one rounding is the storage dtype's own.
        cores = tuple(core.detach().double() for core in factored.cores)
        values = FactoredWeight(factored.spec, cores, factored.frame).dense()
        return nn.Parameter(values.to(factored.dtype).contiguous(), factored.requires_grad)

    weight.restore(dense, build)
    huggingface.forget_factors(dense)
    return dense


def graphs(model: nn.Module, example_inputs: Any = None) -> Graphs:
    """The model's FX graphs before and after, at the level of aten operations.

    Args:
        example_inputs: as in ``compile``; without them, inputs are found as ``compile`` finds them.

    Raises:
        TensorizeError: the model was not made by tensorize.
        CaptureError: no inputs are known, the model does not run on ``example_inputs``, or
            ``torch.export`` cannot trace it.
    """
    found, model = report(model), unwrapped(model)
    batch = capture.needed(model, example_inputs, "graphs need inputs to trace the model with")
    sites = {name: site for site in found.sites for name in (site.name, *site.aliases)}
    before = capture.export_graph(densify(model), batch)
    capture.mark_sites(before, {name: (name, DENSE, ()) for name in sites})
    marks = {name: (name, site.format, site.ranks) for name, site in sites.items()}
    for name, _ in weight.factored(model):
        marks |= dict.fromkeys(weight.core_names(model, name), marks[name])
    after = capture.export_graph(model, batch)
    capture.mark_sites(after, marks)
    result = Graphs(before, after)
    if debug_level() >= 3:
        print(result.print_readable(), file=sys.stderr)
    return result


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a compiled model as safetensors and JSON, atomically.

    Raises:
        CheckpointError: the model was not made by tensorize, or the directory cannot be written.
    """
    checkpoint.save(model, directory)


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a saved model: a Hugging Face one by itself, any other into ``model``.

    No pickle, no network, no dense weights. Returns the model, in evaluation mode. Its weights run
    by what it was compiled for (``backend``); the report says by what, and why.

    Args:
        device: where it goes; None: where ``model`` is, or the CPU.
        dtype: of its floating-point weights; None: as they were saved.

    Raises:
        CheckpointError: the artefact is damaged, foreign, of a newer format, or for another model.
    """
    found = checkpoint.load(directory, model, device=device, dtype=dtype)
    return use_kernels(found, report(found).backend)
