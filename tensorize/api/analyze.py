"""``tensorize.analyze``: learn, once, what every rank of every weight costs.

``analyze`` → ``Analysis.plan`` → ``apply`` are the three stages; ``compile`` is all of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorize.api.analysis import Analysis
from tensorize.api.options import Options
from tensorize.api.wiring import figures
from tensorize.base.errors import AnalysisError, ModelError
from tensorize.base.progress import Progress, announce, no_progress, shown
from tensorize.base.sharded import of_each_rank
from tensorize.base.tensors import unwrapped
from tensorize.cache import analyses as disk
from tensorize.cache.curve_files import Curves, Held
from tensorize.capture.batches import ToInputs, calibration_batches, left_out
from tensorize.capture.forward import in_usual_modes, out_of_memory
from tensorize.capture.inputs import (
    check_model,
    check_module,
    find_inputs,
    notes_on_wrapper,
    without_cache,
)
from tensorize.capture.synthetic import affordable, is_self, self_made
from tensorize.hub.gathered import gathered, is_gathered
from tensorize.ir.plan import POLISH, REFIT
from tensorize.ir.sites import Batch
from tensorize.passes.beside.rehearse import Rehearse
from tensorize.passes.curves.formats import FormatsOption, formats_by_site
from tensorize.passes.curves.in_groups import LearnInGroups
from tensorize.passes.curves.precisions import PrecisionOption, check_own, integers
from tensorize.passes.curves.side_by_side import is_shared_by_ranks, shared_by_ranks
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.observe.counted import CountRows
from tensorize.passes.observe.loss import LossOption, PreservedLoss, function_of, split
from tensorize.passes.observe.parts import CutBatches, in_parts
from tensorize.passes.observe.select import Select, check_weights, named_parameters, require_match
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.pipeline import Pass, run_passes
from tensorize.passes.predict.calibrate import CalibratePrediction
from tensorize.passes.predict.largest import MeasureLargest
from tensorize.passes.predict.metrics import MetricFunction
from tensorize.passes.stages import Analysed, Found, Given
from tensorize.store.fingerprint import fingerprint
from tensorize.store.identity import Opaque
from tensorize.version import __version__
from tensorize.weight.install import factored

log = logging.getLogger("tensorize")


def analyze(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    loss_fn: LossOption = None,
    metrics: Mapping[str, MetricFunction] | None = None,
    metric: str | None = None,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    precision: PrecisionOption = None,
    activations: str | None = None,
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
        CheckpointError: ``cache_dir`` cannot be used. Where its disk fills up, the analysis goes on
            without it, with a warning and a note.

    Examples:
        >>> analysis = tensorize.analyze(dense, calibration=batches)
        >>> [point.budget for point in analysis.curve([0.6, 0.9])]
        [0.6, 0.9]
    """
    return analyzed(model, Options.of(locals()))


@in_usual_modes("analyze")
def analyzed(model: nn.Module, options: Options) -> Analysis:
    """``analyze`` with its options as one record."""
    options.check_data()
    inner = unwrapped(check_module(model))
    if not is_gathered(inner):
        return _analyzed_together(inner, options)
    if options.cache_dir is not None:
        disk.prepare(options.cache_dir)
    given, model = model, check_model(model, inplace=options.inplace)
    check_dense(model, "compile")
    if options.ranks is not None:
        require_match(named_parameters(model), list(options.ranks), "ranks")
    check_weights(model)
    identity = fingerprint(model.named_parameters())
    with shown(options.progress) as tell:
        found = found_in(model, options, tell).noted(*notes_on_wrapper(given, model))
        if options.says_nothing_of_data:
            return _learned_unasked(found, identity, options)
        return _learned(found, identity, options)


def _analyzed_together(model: nn.Module, options: Options) -> Analysis:
    """The analysis of a sharded model: on every process the same, each doing its share."""
    if options.cache_dir is not None or options.max_memory is not None:
        raise AnalysisError(
            "cache_dir= and max_memory= are of one process, and the model is sharded over several",
            way_out="analyse it without them",
        )
    device = next(model.parameters()).device
    with shared_by_ranks(device):
        analysis = analyzed(gathered(model), options)
    alike = repr(analysis.curve())
    if set(of_each_rank(alike, "cpu")) != {alike}:
        raise AnalysisError(
            "processes learned different things of one model",
            way_out="give all of them the same calibration data, on machines of one kind",
        )
    return analysis


def found_in(model: nn.Module, options: Options, tell: Progress) -> Found:
    """The model with its data, and where it uses which weights."""
    batches, made = calibration_of(model, options)
    inputs, source = find_inputs(model, options.example_inputs, batches)
    if options.loss_fn is None and options.metrics is None:
        batches = tuple(without_cache(model, batch) for batch in batches)
    batches, few = in_parts(model, batches)
    given = Given(
        model=model,
        inputs=inputs,
        calibration=batches,
        metric=options.metric or ("loss" if batches else "frobenius"),
        seed=options.seed,
        machine=figures(model),
        notes=(f"uses of the weights were seen with {source}", *made, *few),
        progress=tell,
    )
    cut = CutBatches(whole=options.loss_fn is not None)
    found = run_passes(given, (FindSites(options.include, options.exclude), Rehearse(), cut), Found)
    # A pattern that names no weight is said before the expensive stage.
    formats_by_site(found.free, options.formats)
    check_own(options.precision, {site.dtype for site in found.free})
    return found


def calibration_of(model: nn.Module, options: Options) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """The calibration batches, and a note where the model made them itself."""
    if not is_self(options.calibration):
        given = options.calibration, model, options.tokenizer
        found = calibration_batches(*given, to_inputs=options.to_inputs)
        return found, left_out(found) if options.to_inputs is None else ()
    inputs, _ = find_inputs(model, options.example_inputs, ())
    batches, what = self_made(model, inputs, options.seed)
    return batches, (f"calibrated on {what}",)


def _learned_unasked(found: Found, identity: str, options: Options) -> Analysis:
    """The analysis on calibration data that the model makes unasked, where that costs little.

    It is one of the weights alone, with a note, where the model fails on such data or memory runs
    out: nobody asked for this. No other error leads there.
    """
    if found.inputs is None:
        why = "as no inputs are known that it runs on"
    elif (share := affordable(found.sites, found.inputs)) == 0:
        why = 'as its statistics take long or much memory; calibration="self" takes them'
    else:
        try:
            batches, what = self_made(found.model, found.inputs, found.seed, share)
            own = found.noted(f"no calibration data: calibrated on {what}")
            return _learned(replace(own, calibration=batches, metric="loss"), identity, options)
        except (ModelError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ModelError) or out_of_memory(error)):
                raise
            what = "memory ran out" if out_of_memory(error) else "the model failed"
            said = str(error).partition("\n")[0]
            why = f"as {what} on data of its own ({type(error).__name__}: {said})"
    # Here nothing holds what the error's frames held any more.
    alone = found.noted(f"no calibration data: weights alone, {why}")
    return _learned(alone, identity, options)


def place_of(found: Found, identity: str, options: Options) -> str | None:
    """Where the analysis of a model of this identity is kept; None where it is not.

    Raises:
        Opaque: what it depends on cannot be told.
    """
    if options.cache_dir is None:
        return None
    if options.metrics is not None:
        raise Opaque("it has metrics of the caller's")
    asked = options.formats, integers(options.precision), options.loss_fn, options.refine
    key = disk.key(found, identity, *asked, __version__)
    return disk.location(options.cache_dir, key)


def _learned(found: Found, identity: str, options: Options) -> Analysis:
    """The analysis: from the cache, or made and kept there."""
    try:
        base = place_of(found, identity, options)
    except Opaque as error:
        base, why = None, f"the analysis is not kept in cache_dir: {error}"
        log.warning(why)
        found = found.noted(why)
    held = Held.memory if options.max_memory is None else Held.mapped
    if base is not None and (kept := disk.read(base, held)) is not None:
        analysed = replace(kept, machine=found.machine, history=found.history)
    else:
        analysed, base = _run(found, options, base, held)
    asked = options.precision, options.activations
    return Analysis(analysed, identity, base, found.calibration, options.loss_fn, *asked)


def _run(
    found: Found, options: Options, base: str | None, held: Held
) -> tuple[Analysed, str | None]:
    """What the expensive passes give, and where it is kept: at ``base``, or nowhere."""
    announce(cost_line(found))
    with contextlib.ExitStack() as stack:
        curves = None if base is None else Curves(Path(base), held)
        if curves is None and options.max_memory is not None:
            spilled = tempfile.TemporaryDirectory(prefix="tensorize-", ignore_cleanup_errors=True)
            # What is mapped of its files stays when they are gone.
            curves = Curves(Path(stack.enter_context(spilled)), held)
        loss = None
        if found.metric == "loss":
            loss = PreservedLoss.fit(found.model, found.calibration, options.loss_fn)
            found = found if loss.note is None else found.noted(loss.note)
        passes = _analysis_passes(found, options, curves, loss)
        analysed = replace(run_passes(found, passes, Analysed), progress=no_progress)
        if base is not None and curves is not None:
            why = disk.write(base, curves, analysed)
            if why is not None:
                return analysed.noted(f"the analysis is not kept in cache_dir: {why}"), None
    return analysed, base


def _analysis_passes(
    found: Found, options: Options, curves: Curves | None, loss: PreservedLoss | None
) -> tuple[Pass, ...]:
    """The expensive passes, in order."""
    learnt, held_out = split(found.calibration)
    rows = CountRows(found.calibration, function_of(options.loss_fn))
    refinements = {None: (), POLISH: (REFIT, POLISH)}.get(options.refine, (REFIT,))
    statistics = CollectStatistics(learnt, loss)
    spectra = ComputeSpectra(options.formats, integers(options.precision))
    largest = MeasureLargest(found.calibration, loss)
    # What is kept on disk is for every budget.
    share = options.share if options.cache_dir is None else 0.0
    prediction = CalibratePrediction(
        learnt, held_out, loss, refinements, options.metrics, share=share
    )
    if curves is None and not is_shared_by_ranks():
        return rows, statistics, spectra, largest, prediction
    stored = replace(spectra, store=curves)  # None: they are kept nowhere
    return rows, LearnInGroups(statistics, stored, options.max_memory), largest, prediction


def cost_line(found: Found) -> str:
    """One line: what the analysis will do, and roughly for how long."""
    flops, free = 0.0, found.free
    for site in free:
        m, n = site.matrix
        k = min(m, n)
        flops += (4 * m * n * k + 12 * k**3) * max(site.experts, 1)
    rate = 2e10 * max(torch.get_num_threads(), 1)  # float64 matrix work, a cautious figure
    seconds = flops / rate
    data = f", {len(found.calibration)} calibration batches" if found.calibration else ""
    return (
        f"analysing {len(free)} weights ({sum(s.parameters for s in free) / 1e6:.1f} M "
        f"parameters{data}): roughly {max(seconds, 1):.0f} s of decompositions"
    )


def check_dense(model: nn.Module, verb: str) -> None:
    """Raises AnalysisError where weights of a model are factors already: they would nest."""
    for name, _ in factored(model):
        raise AnalysisError(
            "the weight is compressed already",
            site=name,
            way_out=f"tensorize.{verb}(tensorize.densify(model), …), or the dense model that it "
            "was made from",
        )
