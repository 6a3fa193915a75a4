"""``tensorize.compile_checkpoint``: compress a checkpoint that is never loaded."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tensorize.api import write_factors
from tensorize.api.analysis import Analysis
from tensorize.api.analyze import Kept, cost_line
from tensorize.api.apply import report_of_result
from tensorize.base.errors import CheckpointError
from tensorize.base.progress import Progress, announce, shown
from tensorize.cache import analyses as disk
from tensorize.cache.curve_files import Curves, Held
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import find_inputs
from tensorize.codegen.machine import rates as machine
from tensorize.hub import shards
from tensorize.ir.budget import Budget
from tensorize.passes.allocate.allocate import RanksOption
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.observe.select import Select
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import Program, run_passes
from tensorize.passes.rewrite.pipeline import rewriting
from tensorize.reports.report import Report
from tensorize.store import transformers_config


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
    write_factors.check_metric(metric)
    directory, out = Path(directory), Path(out)
    if directory.is_dir() and out.is_dir() and out.samefile(directory):
        raise CheckpointError(
            f"{out} is the checkpoint's own directory", way_out="choose another directory"
        )
    transformers_config.check_place(out)
    if cache_dir is not None:
        disk.prepare(cache_dir)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = shards.open_checkpoint(directory)
    running = source.model
    inputs, seen = find_inputs(running, None, ())
    if inputs is None and shards.CAN_BE_WITHOUT_MEMORY:
        running = shards.without_memory(source.model)
        inputs, seen = find_inputs(running, None, ())
    program = Program(
        model=running,
        inputs=inputs,
        seed=seed,
        machine=machine.current(str(where)),
        notes=(f"uses of the weights were seen with {seen}", *source.notes),
    )
    with shown(progress) as tell, write_factors.workplace(out) as folder:
        identity = source.fingerprint(partial(tell, "reading"))
        program = run_passes(replace(program, progress=tell), (FindSites(include, exclude),))
        program = replace(program, model=source.model)
        kept = Kept(identity, folder if cache_dir is None else cache_dir, None, None, formats, None)
        base = kept.base(program)
        assert base is not None
        curves = Curves(Path(base), Held.shapes)
        announce(cost_line(program))
        spectra = ComputeSpectra(formats, lambda name: source.read(name).to(where), curves)
        program = run_passes(program, (spectra,))
        analysis = Analysis(program.without_model(), identity)
        plan = analysis.plan(limits, refine=None, ranks=ranks)
        program = replace(program, plan=plan)
        factors = write_factors.Factors(source, curves, folder)
        program = run_passes(program, rewriting(None, sink=factors.in_file))
        report = report_of_result(program, analysis)
        factors.artefact(program).save(program.model, report, out)
        shutil.rmtree(folder, ignore_errors=True)
    return report
