"""``tensorize.compile_checkpoint``: compress a checkpoint that is never loaded."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tensorize.api import write_factors
from tensorize.api.analysis import Analysis, planned
from tensorize.api.analyze import cost_line, place_of
from tensorize.api.apply import report_of_result
from tensorize.api.options import Options
from tensorize.base.errors import BudgetError, CheckpointError
from tensorize.base.progress import Progress, announce, no_progress, shown
from tensorize.cache import analyses as disk
from tensorize.cache.curve_files import Curves, Held
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import find_inputs
from tensorize.codegen.machine import rates as machine
from tensorize.hub import shards
from tensorize.ir.budget import Budget
from tensorize.passes.allocate.allocate import RanksOption
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.curves.precisions import PrecisionOption, check_own, integers
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.observe.select import Select
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import run_passes
from tensorize.passes.rewrite.pipeline import rewriting
from tensorize.passes.stages import (
    Analysed,
    Found,
    Given,
    Learned,
    Observed,
    Opened,
    Planned,
    Rewritten,
)
from tensorize.reports.report import Report
from tensorize.store import transformers_config


def compile_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    budget: float | str | Budget | None = 0.1,
    *,
    metric: str | None = None,
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    precision: PrecisionOption = None,
    activations: str | None = None,
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
        budget, include, exclude, formats, precision, activations, ranks, seed, progress: as in
            ``compile``.
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
    write_factors.check_metric(metric)  # it says more than the record, of one that is none too
    return streamed(Path(directory), Path(out), Options.of(locals()))


@in_usual_modes("compile_checkpoint")
def streamed(directory: Path, out: Path, options: Options) -> Report:
    """``compile_checkpoint`` with its options as one record."""
    write_factors.check_metric(options.metric)
    options = replace(options, refine=None)
    options.check_choice()
    limits = options.limits(None)
    if limits is not None and limits.file is not None:
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
    running = source.model
    inputs, seen = find_inputs(running, None, ())
    if inputs is None and shards.CAN_BE_WITHOUT_MEMORY:
        running = shards.without_memory(source.model)
        inputs, seen = find_inputs(running, None, ())
    given = Given(
        model=running,
        inputs=inputs,
        seed=options.seed,
        machine=machine.current(str(where)),
        notes=(f"uses of the weights were seen with {seen}", *source.notes),
    )
    with shown(options.progress) as tell, write_factors.workplace(out) as folder:
        identity = source.fingerprint(partial(tell, "reading"))
        find = FindSites(options.include, options.exclude)
        found = run_passes(replace(given, progress=tell), (find,), Found)
        check_own(options.precision, {site.dtype for site in found.free})
        found = replace(found, model=source.model)
        kept = options if options.cache_dir is not None else replace(options, cache_dir=folder)
        base = place_of(found, identity, kept)
        assert base is not None
        curves = Curves(Path(base), Held.shapes)
        announce(cost_line(found))
        spectra = ComputeSpectra(
            options.formats,
            integers(options.precision),
            lambda name: source.read(name).to(where),
            curves,
        )
        observed = found.to(Observed, statistics={})
        analysed = run_passes(observed, (spectra,), Learned).to(Analysed, predictor=None)
        asked = {"precision": options.precision, "activations": options.activations}
        analysis = Analysis(replace(analysed, progress=no_progress), identity, **asked)
        plan = planned(analysis, replace(options, formats=None)).alone
        opened = analysed.to(Planned, plan=plan).to(Opened, model=source.model)
        factors = write_factors.Factors(source, curves, folder)
        done = run_passes(opened, rewriting(None, sink=factors.in_file), Rewritten)
        report = report_of_result(done, analysis)
        factors.artefact(done.model, done.plan).save(done.model, report, out)
        shutil.rmtree(folder, ignore_errors=True)
    return report
