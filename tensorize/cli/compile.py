"""``tensorize compile``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import tensorize
from tensorize.api.compile import compiled
from tensorize.api.options import Options
from tensorize.api.stream import streamed
from tensorize.base import printer
from tensorize.base.errors import CheckpointError, TensorizeError
from tensorize.cli import options as option
from tensorize.cli.parse import read_options
from tensorize.cli.sources import Dtype, tokenizer_of
from tensorize.cli.telling import (
    check_target,
    count_text,
    errors_told,
    load_result,
    print_json,
    say,
)
from tensorize.codegen.device import kernel
from tensorize.codegen.device.compiler import TARGETS, check_compiler
from tensorize.reports.report import Report
from tensorize.store.transformers_config import check_place


def compile_command(
    source: option.Source,
    out: Annotated[Path, typer.Option(help="Directory to save the result in.", show_default=False)],
    budget: option.Budget = str(Options.budget),
    calibration: option.Calibration = None,
    metric: option.Metric = None,
    refine: option.Refine = "auto",
    include: option.Include = None,
    exclude: option.Exclude = None,
    formats: option.Formats = None,
    precision: option.Precision = None,
    activations: option.Activations = None,
    seed: option.Seed = Options.seed,
    cache_dir: option.Cache = None,
    max_memory: option.MaxMemory = None,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = Dtype.auto,
    backend: option.Backend = Options.backend,
    autotune: option.Autotune = Options.autotune,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as a page.", show_default=False)
    ] = None,
    emit: Annotated[
        Path | None,
        typer.Option(
            help="Also write the Triton kernels of the result to this directory.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compile them for it: cuda:80, cuda:90, cuda:100, hip:gfx90a or hip:gfx942, which "
            "need not be here; repeatable.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a checkpoint directory one weight at a time and never load it; weights are "
            "judged by themselves. A run that was killed goes on after the last weight.",
        ),
    ] = False,
    as_json: option.Json = False,
) -> None:
    """Compress a model and save it: weights, report, and the tokenizer where there is one."""
    with errors_told():
        options = read_options(locals())
        check_target(html, "--html")
        _check_out(out, source)
        _check_emit(emit, target)
        if stream:
            _check_streams(
                {
                    "--calibration": calibration is not None,
                    "--refine": refine not in ("auto", "none"),
                    "--max-memory": max_memory is not None,
                    "--dtype": dtype is not Dtype.auto,
                    "--backend": backend != Options.backend,
                    "--autotune": autotune,
                    "--emit": emit is not None,
                }
            )
            with contextlib.redirect_stdout(sys.stderr):
                report = _stream(source, out, options)
                if html is not None:
                    report.to_html(html)
            _tell_saved(out, report, html, as_json, "")
            return
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = load_result(source, dtype, calibration, batch_size, max_length)
            say(f"compressing {count_text(loaded.model)} parameters to {options.budget}")
            data = {"example_inputs": loaded.example_inputs, "calibration": batches}
            model = compiled(loaded.model, replace(options, inplace=True, **data))
            report = tensorize.report(model)
            tensorize.save(model, out)
            if loaded.tokenizer is not None:
                _save_tokenizer(loaded.tokenizer, out)
            if html is not None:
                report.to_html(html)
            kernels = None if emit is None else _emit(model, emit, target or [], out)
        argument = "" if loaded.factory is None else f", model={loaded.factory}"
        _tell_saved(out, report, html, as_json, argument, kernels, emit)


def _check_streams(given: Mapping[str, bool]) -> None:
    for name, is_given in given.items():
        if is_given:
            raise typer.BadParameter(
                "needs the whole model, and --stream never loads it", param_hint=name
            )


def _stream(source: str, out: Path, options: Options) -> Report:
    """Compress a checkpoint a weight at a time, and say what it took."""
    say(f"streaming {source} to {options.budget}")
    start = time.perf_counter()
    report = streamed(Path(source), out, options)
    if (tokenizer := tokenizer_of(source)) is not None:
        _save_tokenizer(tokenizer, out)
    seconds, count = time.perf_counter() - start, report.totals.before.parameters
    for stage in report.history:
        say(f"{stage.name}: {printer.seconds(stage.seconds)}: {stage.summary}")
    say(
        f"{count:,} parameters in {printer.seconds(seconds)}, {1e6 * seconds / count:.3g} us a "
        f"parameter{_peak_memory()}"
    )
    return report


def _peak_memory() -> str:
    """The most memory that this process held, where the system tells."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return ""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return f"; peak resident memory {printer.bytes_(unit * size)}"


def _check_emit(emit: Path | None, targets: list[str] | None) -> None:
    if targets and emit is None:
        raise typer.BadParameter("says what --emit compiles; give both", param_hint="--target")
    for target in targets or ():
        if target not in TARGETS:
            raise typer.BadParameter(
                f"{target!r} is not one of {', '.join(TARGETS)}", param_hint="--target"
            )
    if emit is not None and emit.exists() and not emit.is_dir():
        raise typer.BadParameter(f"{emit} is not a directory", param_hint="--emit")
    if targets:
        check_compiler()


def _emit(
    model: nn.Module, directory: Path, targets: list[str], out: Path
) -> dict[str, dict[str, dict[str, int]]]:
    found = tensorize.kernels(model)
    say(f"writing {len(found)} kernels for {', '.join(targets) or 'reading'}")
    try:
        return kernel.write(found, directory, targets)
    except (OSError, TensorizeError) as error:
        raise CheckpointError(
            f"the model is saved in {out}, its kernels are not: {error}",
            way_out="load it from there, and write tensorize.kernels(model) to another place",
        ) from error


def _check_out(out: Path, source: str) -> None:
    if os.path.isdir(source) and out.exists() and os.path.samefile(out, source):
        raise typer.BadParameter("is the model's own directory; choose another", param_hint="--out")
    check_place(out)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(
            f"{out} cannot be written: {place} is not a directory that you may write to",
            way_out="choose another directory with --out",
        )


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise CheckpointError(
            f"the model is saved in {out}, its tokenizer is not: {error}",
            way_out="copy the tokenizer's files there",
        ) from error


# ------------------------------------------------------------------------------ output, errors


def _tell_saved(
    out: Path,
    report: Report,
    html: Path | None,
    as_json: bool,
    argument: str,
    kernels: Mapping[str, Any] | None = None,
    emit: Path | None = None,
) -> None:
    """What was saved where, and how it is loaded."""
    if as_json:
        about = {} if kernels is None else {"kernels": kernels}
        print_json({"directory": str(out), "report": report.to_dict(), **about})
        return
    typer.echo(str(report))
    typer.echo(f"\nsaved in {out} ({_size(out)}): {', '.join(_names(out))}")
    if html is not None:
        typer.echo(f"report as a page: {html}")
    if kernels is not None:
        typer.echo(f"{len(kernels)} kernels are in {emit}")
    typer.echo(f'load it with tensorize.load("{out}"{argument})')


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _size(directory: Path) -> str:
    return printer.bytes_(sum(p.stat().st_size for p in directory.iterdir() if p.is_file()))
