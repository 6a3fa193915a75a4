"""``tensorize.compile_checkpoint``: compress a checkpoint that is never loaded.

Weights by themselves one at a time, or with data layer by layer (``passes/layers``).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorize.api import write_factors
from tensorize.api.analysis import Analysis, planned
from tensorize.api.analyze import cost_line, place_of
from tensorize.api.apply import report_of_result
from tensorize.api.options import Options
from tensorize.api.outcome import outlook_of
from tensorize.base.errors import AnalysisError, BudgetError, CheckpointError
from tensorize.base.progress import Progress, announce, no_progress, shown
from tensorize.cache import analyses as disk
from tensorize.cache.curve_files import Curves, Held
from tensorize.capture.batches import ToInputs, calibration_batches, left_out, moved
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import find_inputs, without_cache
from tensorize.capture.synthetic import is_self
from tensorize.codegen.machine import rates as machine
from tensorize.hub import shards, zeros
from tensorize.ir.budget import Budget
from tensorize.ir.plan import POLISH, REFIT
from tensorize.ir.sites import Batch
from tensorize.passes.allocate.allocate import RanksOption
from tensorize.passes.curves.formats import FormatsOption, formats_by_site
from tensorize.passes.curves.precisions import PrecisionOption, check_own, integers
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.layers.chain import find_chain
from tensorize.passes.layers.cost import cost_in_layers
from tensorize.passes.layers.count import CountInLayers
from tensorize.passes.layers.layers import Layers, two_texts
from tensorize.passes.layers.learn import LearnInLayers
from tensorize.passes.layers.predict import PredictInLayers
from tensorize.passes.layers.refit import RefitInLayers
from tensorize.passes.layers.work import Work
from tensorize.passes.observe.loss import split
from tensorize.passes.observe.parts import cut_by_size
from tensorize.passes.observe.select import Select
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import Pass, run_passes
from tensorize.passes.predict.calibrate import CalibratePrediction
from tensorize.passes.rewrite.pipeline import rewriting
from tensorize.passes.stages import (
    Analysed,
    Found,
    Given,
    Observed,
    Opened,
    Planned,
    Record,
    Rewritten,
)
from tensorize.reports.report import Report
from tensorize.store import transformers_config


def compile_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    budget: float | str | Budget | None = 0.1,
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    metric: str | None = None,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    precision: PrecisionOption = None,
    activations: str | None = None,
    ranks: RanksOption = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Compress a Hugging Face checkpoint that is never loaded: one layer at a time is in memory.

    ``out`` then holds what ``save(compile(model, budget, …), out)`` would write. Without
    calibration data weights are judged by themselves, and one weight at a time is read. With them
    all batches go through the layers one after the other, forth and back; what arrives at each
    lies on disk. What is finished does so at once: called again after it was killed, with the same
    checkpoint, data and options, it goes on there.

    Args:
        directory: ``config.json`` and safetensors, in shards or in one file.
        out: where the result goes; until it is complete, a folder in it keeps what is finished.
        calibration: at least two batches, as in ``compile``.
        budget, include, exclude, formats, precision, activations, ranks: as in ``compile``.
        tokenizer, to_inputs, seed, progress: likewise.
        metric: ``"loss"`` or ``"input"``, with ``calibration``, or ``"frobenius"``. The first two
            stream where the model is a list of layers that are called one after the other.
        refine: None, ``"refit"`` or "auto", as in ``compile``; a polish needs the whole model.
        device: where layers and decompositions run; None: a GPU where there is one, else the CPU.
        cache_dir: keep what is learned here, for other budgets, and not in ``out``.
        scratch: where activations lie meanwhile; None: in ``out``.

    Returns:
        The report of the result; ``load(out)`` gives the model.

    Raises:
        BudgetError: the budget is malformed or not feasible.
        CaptureError: the directory is no checkpoint that can be read a tensor at a time.
        AnalysisError: weights, data or options do not allow an analysis, or the model's layers are
            no chain.
        CheckpointError: ``out`` or ``cache_dir`` cannot be written, or ``out`` holds a dense
            checkpoint.
    """
    options = Options.of(locals())
    return streamed(Path(directory), Path(out), options)


@in_usual_modes("compile_checkpoint")
def streamed(directory: Path, out: Path, options: Options) -> Report:
    """``compile_checkpoint`` with its options as one record."""
    _check_options(options)
    if options.calibration is None or options.metric == "frobenius":
        options = replace(options, refine=None)
    options.check_choice()
    limits = options.budget if options.calibration is not None else options.limits(None)
    if isinstance(limits, Budget) and limits.file is not None:
        raise BudgetError(
            f"{limits}: files that a stream writes are not coded",
            way_out="load what it wrote without that limit, and save it with coded=",
        )
    if directory.is_dir() and out.is_dir() and out.samefile(directory):
        raise CheckpointError(
            f"{out} is the checkpoint's own directory", way_out="choose another directory"
        )
    transformers_config.check_place(out)
    if options.cache_dir is not None:
        disk.prepare(options.cache_dir)
    where = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = shards.open_checkpoint(directory)
    with shown(options.progress) as tell, write_factors.workplace(out) as folder:
        identity = source.fingerprint(partial(tell, "reading"))
        stream = _Stream(source, options, where)
        with zeros.WithoutWork():
            found, running = stream.found(tell)
        kept = options if options.cache_dir is not None else replace(options, cache_dir=folder)
        base = place_of(found, identity, kept)
        assert base is not None
        curves = Curves(Path(base), Held.shapes)
        announce(cost_line(found))
        work = Path(options.scratch or folder) / f"layers-{Path(base).name}"
        layers, found = stream.layers(found, running, Work(work))
        analysed = run_passes(*stream.analysis(found, curves, layers), Analysed)
        asked = {"precision": options.precision, "activations": options.activations}
        quiet = replace(analysed, progress=no_progress)
        analysis = Analysis(quiet, identity, calibration=found.calibration, **asked)
        plan = planned(analysis, replace(options, formats=None)).alone
        opened = analysed.to(Planned, plan=plan).to(Opened, model=source.model)
        factors = write_factors.Factors(source, curves, folder)
        if plan.refine is not None:
            assert layers is not None
            refit = RefitInLayers(layers, curves)
            opened = run_passes(opened, (refit,), Opened)
            factors = replace(factors, refined=refit.found(opened))
        done = run_passes(opened, rewriting(None, sink=factors.in_file), Rewritten)
        report = report_of_result(done, analysis, outlook_of(done.plan, analysis))
        factors.artefact(done.model, done.plan).save(done.model, report, out)
        for finished in (work, folder):
            shutil.rmtree(finished, ignore_errors=True)
    return report


def _check_options(options: Options) -> None:
    """Raises AnalysisError for what a stream does not do."""
    options.check_data()
    if is_self(options.calibration):
        raise AnalysisError(
            "calibration='self': a model that is not loaded writes no text",
            way_out="calibration= with batches, or with strings and tokenizer=",
        )
    if options.refine == POLISH:
        raise AnalysisError(
            "refine='polish' needs gradients of the whole model, which a stream never loads",
            way_out="refine='refit'",
        )


@dataclass(frozen=True)
class _Stream:
    """A checkpoint, and what is asked of it."""

    source: shards.Checkpoint
    options: Options
    device: torch.device

    def found(self, tell: Progress) -> tuple[Found, nn.Module]:
        """The weights of the checkpoint's model and its data; and a copy of it that runs."""
        options, model = self.options, self.source.model
        data = calibration_batches(
            options.calibration, model, options.tokenizer, to_inputs=options.to_inputs
        )
        inputs, running, seen = _running(model, data)
        batches = tuple(without_cache(model, batch) for batch in data)
        if len(batches) == 1:
            raise AnalysisError(
                "calibration= holds one batch, and some are to be held out",
                way_out="give its samples as several batches",
            )
        given = Given(
            model=running,
            inputs=inputs,
            calibration=batches,
            metric=options.metric or ("loss" if batches else "frobenius"),
            seed=options.seed,
            machine=machine.current(str(self.device)),
            notes=(
                f"uses of the weights were seen with {seen}",
                *self.source.notes,
                *(left_out(batches) if options.to_inputs is None else ()),
            ),
        )
        find = FindSites(options.include, options.exclude)
        found = run_passes(replace(given, progress=tell), (find,), Found)
        formats_by_site(found.free, options.formats)
        check_own(options.precision, {site.dtype for site in found.free})
        return replace(found, model=model), running

    def layers(self, found: Found, running: nn.Module, work: Work) -> tuple[Layers | None, Found]:
        """The model layer by layer, where data go through it; and its batches, cut."""
        if found.metric == "frobenius":
            return None, replace(found, calibration=())
        with zeros.WithoutWork():
            cut, together = cut_by_size(replace(found, model=running))
            found = replace(found, calibration=cut.calibration)
            first = moved(found.calibration[0], next(running.parameters()).device)
            names = {site.name for site in found.free}
            chain = find_chain(copy.deepcopy(self.source.model), running, first, names)
        texts = two_texts(running, split(found.calibration)[1][0])
        layers = Layers(
            chain, self.source.value, found.calibration, work, together, texts, self.device
        )
        announce(cost_in_layers(layers, found))
        return layers, found

    def analysis(
        self, found: Found, curves: Curves, layers: Layers | None
    ) -> tuple[Record, tuple[Pass[Any, Any], ...]]:
        """The expensive passes, and what they begin with."""
        options = self.options
        spectra = ComputeSpectra(
            options.formats,
            integers(options.precision),
            lambda name: self.source.read(name).to(self.device),
            curves,
        )
        if layers is None:
            return found.to(Observed, statistics={}), (spectra, CalibratePrediction((), (), None))
        place = {batch: j for j, batch in enumerate(found.calibration)}
        learnt, held_out = (
            tuple(place[batch] for batch in part) for part in split(found.calibration)
        )
        refinements = () if options.refine is None else (REFIT,)
        predict = PredictInLayers(layers, learnt, held_out, curves, refinements)
        return found, (CountInLayers(layers), LearnInLayers(layers, learnt, spectra), predict)


def _running(model: nn.Module, data: Sequence[Batch]) -> tuple[Batch | None, nn.Module, str]:
    """What a model on meta, or a copy of zeros, runs on; that copy; and where it is from."""
    running, inputs, seen = model, None, ""
    if not data or not zeros.CAN_BE_WITHOUT_MEMORY:
        on_meta = tuple(moved(batch, "meta") for batch in data[:1])
        inputs, seen = find_inputs(running, None, on_meta)
    if inputs is None and zeros.CAN_BE_WITHOUT_MEMORY:
        running = zeros.without_memory(model)
        inputs, seen = find_inputs(running, None, tuple(data[:1]))
    return inputs, running, seen
