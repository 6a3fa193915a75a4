"""``tensorize compile``."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tensorize
from tensorize.base import printer
from tensorize.cli import options as option
from tensorize.cli.telling import check_target, errors_told, print_json, say

if TYPE_CHECKING:
    from tensorize.api.options import Options
    from tensorize.reports.report import Report

_BACKEND = "auto"


def compile_command(
    source: option.Source,
    out: Annotated[Path, typer.Option(help="Directory to save the result in.", show_default=False)],
    budget: option.Budget = "0.1",
    calibration: option.Calibration = None,
    metric: option.Metric = None,
    refine: option.Refine = "auto",
    include: option.Include = None,
    exclude: option.Exclude = None,
    formats: option.Formats = None,
    precision: option.Precision = None,
    activations: option.Activations = None,
    seed: option.Seed = 0,
    cache_dir: option.Cache = None,
    max_memory: option.MaxMemory = None,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = option.Dtype.auto,
    backend: option.Backend = _BACKEND,
    autotune: option.Autotune = False,
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
    target: option.Target = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Never load a checkpoint directory: one weight at a time is read, and weights are "
            "judged by themselves, or with --calibration one layer. A run that was killed goes on.",
        ),
    ] = False,
    scratch: option.Scratch = None,
    as_json: option.Json = False,
) -> None:
    """Compress a model and save it: weights, report, and the tokenizer where there is one."""
    given = locals()
    from tensorize.api.compile import compiled
    from tensorize.cli.parse import read_options
    from tensorize.cli.saving import check_emit, check_out, save_tokenizer, write_kernels
    from tensorize.cli.sources import load_told
    from tensorize.weight.whole_model import numbers

    with errors_told():
        options = read_options(given)
        check_target(html, "--html")
        check_out(out, source)
        check_emit(emit, target)
        if stream:
            _check_streams(
                {
                    "--max-memory": max_memory is not None,
                    "--dtype": dtype is not option.Dtype.auto,
                    "--backend": backend != _BACKEND,
                    "--autotune": autotune,
                    "--emit": emit is not None,
                }
            )
            with contextlib.redirect_stdout(sys.stderr):
                data = _data(source, calibration, batch_size, max_length)
                report = _stream(source, out, replace(options, calibration=data))
                if html is not None:
                    report.to_html(html)
            _tell_saved(out, report, html, as_json, "")
            return
        if scratch is not None:
            raise typer.BadParameter("is for --stream", param_hint="--scratch")
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = load_told(source, dtype, calibration, batch_size, max_length)
            say(f"compressing {numbers(loaded.model):,} parameters to {options.budget}")
            data = {"example_inputs": loaded.example_inputs, "calibration": batches}
            model = compiled(loaded.model, replace(options, inplace=True, **data))
            report = tensorize.report(model)
            tensorize.save(model, out)
            if loaded.tokenizer is not None:
                save_tokenizer(loaded.tokenizer, out)
            if html is not None:
                report.to_html(html)
            kernels = None if emit is None else write_kernels(model, emit, target or [], out)
        argument = "" if loaded.factory is None else f", model={loaded.factory}"
        _tell_saved(out, report, html, as_json, argument, kernels, emit)


def _check_streams(given: Mapping[str, bool]) -> None:
    for name, is_given in given.items():
        if is_given:
            raise typer.BadParameter(
                "needs the whole model, and --stream never loads it", param_hint=name
            )


def _data(source: str, calibration: Path | None, batch_size: int, max_length: int) -> Any:
    """The calibration batches of a model that is not loaded."""
    from tensorize.cli.sources import Loaded, read_batches, tokenizer_of
    from tensorize.hub.shards import open_checkpoint

    if calibration is None:
        return None
    if str(calibration) == "self" and not calibration.exists():
        return "self"
    model = open_checkpoint(Path(source)).model
    return read_batches(calibration, Loaded(model, tokenizer_of(source)), batch_size, max_length)


def _stream(source: str, out: Path, options: Options) -> Report:
    """Compress a checkpoint a weight or a layer at a time, and say what it took."""
    from tensorize.api.stream import streamed
    from tensorize.cli.saving import save_tokenizer
    from tensorize.cli.sources import tokenizer_of

    say(f"streaming {source} to {options.budget}")
    start = time.perf_counter()
    report = streamed(Path(source), out, options)
    if (tokenizer := tokenizer_of(source)) is not None:
        save_tokenizer(tokenizer, out)
    seconds, count = time.perf_counter() - start, report.totals.before.parameters
    for stage in report.history:
        say(f"{stage.name}: {printer.seconds(stage.seconds)}: {stage.summary}")
    say(
        f"{count:,} parameters in {printer.seconds(seconds)}, "
        f"{printer.seconds(seconds / count)} a parameter{_peak_memory()}"
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
