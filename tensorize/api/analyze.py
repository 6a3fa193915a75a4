"""The driver: from a dense model to a compressed one. The only file that knows passes and codegen.

``analyze`` → ``Analysis.plan`` → ``apply`` are the three stages; ``compile`` is all of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorize.api.analysis import Analysis, check_refine
from tensorize.api.wiring import figures
from tensorize.base.errors import AnalysisError, ModelError, check_one_of
from tensorize.base.progress import Progress, announce, shown
from tensorize.cache import analyses as disk
from tensorize.cache.curve_files import Curves, Held
from tensorize.capture.batches import calibration_batches
from tensorize.capture.forward import in_usual_modes, out_of_memory
from tensorize.capture.inputs import check_model, find_inputs
from tensorize.capture.synthetic import affordable, self_made
from tensorize.ir.budget import parse_bytes
from tensorize.ir.plan import POLISH, REFIT
from tensorize.ir.sites import Batch
from tensorize.passes.curves.formats import FormatsOption, formats_by_site
from tensorize.passes.curves.in_groups import LearnInGroups
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.observe.loss import LossFunction, PreservedLoss, split
from tensorize.passes.observe.select import Select, check_weights
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.pipeline import Pass, Program, run_passes
from tensorize.passes.predict.calibrate import CalibratePrediction
from tensorize.passes.predict.largest import MeasureLargest
from tensorize.store.fingerprint import fingerprint
from tensorize.version import __version__

log = logging.getLogger("tensorize")

METRICS = ("frobenius", "input", "loss")


SELF = "self"


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
    check_model(model)
    check_weights(model)
    check_refine(refine)
    batches, made = calibration_of(calibration, model, example_inputs, seed, tokenizer)
    unasked = calibration is None and metric is None and loss_fn is None
    metric = _metric(metric, batches, loss_fn)
    inputs, source = find_inputs(model, example_inputs, batches)
    program = Program(
        model=model,
        inputs=inputs,
        calibration=batches,
        metric=metric,
        seed=seed,
        machine=figures(model),
        notes=(f"uses of the weights were seen with {source}", *made),
    )
    identity = fingerprint(model.named_parameters())
    with shown(progress) as tell:
        program = replace(program, progress=tell)
        program = run_passes(program, (FindSites(include, exclude),))
        # A format that is none is said before the expensive stage.
        formats_by_site([site for site in program.sites if site.blocked is None], formats)
        kept = Kept(identity, cache_dir, most, loss_fn, formats, refine)
        return _learned_unasked(program, kept) if unasked else _learned(program, kept)


@dataclass(frozen=True)
class Kept:
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


def _learned(program: Program, kept: Kept) -> Analysis:
    """The analysis of a program: from the cache, or made and kept there."""
    base = kept.base(program)
    held = Held.memory if kept.max_bytes is None else Held.mapped
    if base is not None and (found := disk.read(base, program, held)) is not None:
        found = replace(found, machine=program.machine)
        return Analysis(found, kept.identity, base, program.calibration, kept.loss_fn)
    announce(cost_line(program))
    with contextlib.ExitStack() as stack:
        curves = None if base is None else Curves(Path(base), held)
        if curves is None and kept.max_bytes is not None:
            spilled = tempfile.TemporaryDirectory(prefix="tensorize-", ignore_cleanup_errors=True)
            # What is mapped of its files stays when they are gone.
            curves = Curves(Path(stack.enter_context(spilled)), held)
        released = run_passes(program, _analysis_passes(program, kept, curves)).without_model()
        if base is not None and curves is not None:
            disk.write(base, curves, released)
    return Analysis(released, kept.identity, base, program.calibration, kept.loss_fn)


def _of_itself(calibration: Any) -> bool:
    """Whether the model makes its calibration data; an array would answer ``==`` by entries."""
    return isinstance(calibration, str) and calibration == SELF


def calibration_of(
    calibration: Any, model: nn.Module, example_inputs: Any, seed: int, tokenizer: Any = None
) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """The calibration batches, and a note where the model made them itself."""
    if calibration is None:
        return (), ()
    if not _of_itself(calibration):
        return calibration_batches(calibration, model, tokenizer), ()
    inputs, _ = find_inputs(model, example_inputs, ())
    batches, what = self_made(model, inputs, seed)
    return batches, (f"calibrated on {what}",)


def _learned_unasked(program: Program, kept: Kept) -> Analysis:
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


def _analysis_passes(program: Program, kept: Kept, curves: Curves | None) -> tuple[Pass, ...]:
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


def cost_line(program: Program) -> str:
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
