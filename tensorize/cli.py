"""The command line: ``tensorize compile | analyze | report | eval | bench | calibrate``.

Results go to standard output (``--json``: one JSON object and nothing else), everything said on the
way to standard error. Exit codes: 0 done, 2 wrong usage, 3 a model, its inputs or its calibration
data cannot be used, 4 the budget is not feasible, 5 an artefact cannot be read or written, 130
interrupted, 1 a defect. ``TENSORIZE_DEBUG=1`` shows the traceback of an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tensorize
from tensorize import printer, tuning
from tensorize.budget import Budget, parse_bytes
from tensorize.codegen import kernel, launch, machine
from tensorize.codegen.launch import TARGETS
from tensorize.errors import BudgetError, CheckpointError, TensorizeError
from tensorize.huggingface import check_place
from tensorize.manifest import read_report
from tensorize.report import Report
from tensorize.sources import (
    Dtype,
    Loaded,
    example_tokens,
    load_compressed,
    load_source,
    parse_budget,
    parse_formats,
    parse_shares,
    read_batches,
    tokenizer_of,
)
from tensorize.speed import speeds

app = typer.Typer(
    name="tensorize",
    help="Compress a PyTorch model into low-rank and tensor-train form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFECT, USAGE, CAPTURE, BUDGET, CHECKPOINT, INTERRUPTED = 1, 2, 3, 4, 5, 130


class Refine(StrEnum):
    """What is done to the factors after the decompositions."""

    auto = "auto"
    none = "none"
    refit = "refit"
    polish = "polish"


class Backend(StrEnum):
    """What weights run by."""

    auto = "auto"
    aten = "aten"
    triton = "triton"
    inductor = "inductor"


class Metric(StrEnum):
    """How a weight's error is weighed."""

    frobenius = "frobenius"
    input = "input"
    loss = "loss"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face directory or id, or package.module:factory.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="A text file (documents are separated by blank lines, or are lines), or a "
        ".safetensors file with a tensor for each input, whose first axis is the sample; or self: "
        "the model makes its own.",
        show_default=False,
    ),
]
RefineOption = Annotated[
    Refine, typer.Option(help="What is done to the factors with the calibration data.")
]
MetricOption = Annotated[
    Metric | None,
    typer.Option(
        help="Default: loss; frobenius (the weights alone) where there are no calibration data and "
        "the model is too large to make some unasked.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Shell pattern of weights to consider; repeatable.", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Shell pattern of weights to leave dense; repeatable.", show_default=False),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        help="dense, low_rank, shared, tt or block, or PATTERN=FORMAT,...; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the probes.")]
Cache = Annotated[
    Path | None, typer.Option(help="Directory that keeps analyses.", show_default=False)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="The most that second moments may take at once, as 4GB: weights are then analysed in "
        "groups, to the same bits.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


_ROWS = ",".join(map(str, tuning.ROWS))


# ------------------------------------------------------------------------------------ commands


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(tensorize.__version__)
        raise typer.Exit()


@app.command(
    "compile",
    epilog="Example: tensorize compile ./my-llama --budget 0.3 --calibration text.txt "
    "--out ./my-llama-small",
)
def compile_command(
    source: Source,
    out: Annotated[Path, typer.Option(help="Directory to save the result in.", show_default=False)],
    budget: Annotated[
        str,
        typer.Option(
            help="Share of the parameters to keep, or params=0.3,error=0.05,bytes=2e6,flops=...,"
            "latency=...,loss=... (up to 1: a share; above: an absolute number)."
        ),
    ] = "0.1",
    calibration: Calibration = None,
    metric: MetricOption = None,
    refine: RefineOption = Refine.auto,
    include: Include = None,
    exclude: Exclude = None,
    formats: Formats = None,
    seed: Seed = 0,
    cache: Cache = None,
    max_memory: MaxMemory = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    backend: Annotated[
        Backend,
        typer.Option(
            help="What weights run by once the model is loaded: torch's matmuls (aten), kernels "
            "(triton), or kernels where they were measured to be faster (auto)."
        ),
    ] = Backend.auto,
    autotune: Annotated[
        bool, typer.Option(help="Time the contraction orders of tensor trains on this machine.")
    ] = False,
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
    as_json: Json = False,
) -> None:
    """Compress a model and save it: weights, report, and the tokenizer where there is one."""
    with _errors_told():
        limits = parse_budget(budget)
        chosen = parse_formats(formats)
        _check_target(html, "--html")
        _check_out(out, source)
        _check_emit(emit, target)
        _check_size(max_memory)
        if stream:
            _check_streams(
                {
                    "--calibration": calibration is not None,
                    "--refine": refine not in (Refine.auto, Refine.none),
                    "--max-memory": max_memory is not None,
                    "--dtype": dtype is not Dtype.auto,
                    "--backend": backend is not Backend.auto,
                    "--autotune": autotune,
                    "--emit": emit is not None,
                }
            )
            with contextlib.redirect_stdout(sys.stderr):
                report = _stream(source, out, limits, metric, include, exclude, chosen, seed, cache)
                if html is not None:
                    report.to_html(html)
            _tell_saved(out, report, html, as_json, "")
            return
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = _load(source, dtype, calibration, batch_size, max_length)
            _say(f"compressing {_count(loaded.model)} parameters to {limits}")
            model = tensorize.compile(
                loaded.model,
                limits,
                example_inputs=loaded.example_inputs,
                calibration=batches,
                metric=None if metric is None else metric.value,
                refine=None if refine is Refine.none else refine.value,
                include=include or None,
                exclude=exclude or None,
                formats=chosen,
                backend=backend.value,
                autotune=autotune,
                inplace=True,
                seed=seed,
                cache_dir=cache,
                max_memory=max_memory,
            )
            report = tensorize.report(model)
            tensorize.save(model, out)
            if loaded.tokenizer is not None:
                _save_tokenizer(loaded.tokenizer, out)
            if html is not None:
                report.to_html(html)
            kernels = None if emit is None else _emit(model, emit, target or [], out)
        argument = "" if loaded.factory is None else f", model={loaded.factory}"
        _tell_saved(out, report, html, as_json, argument, kernels, emit)


@app.command(
    "analyze",
    epilog="Example: tensorize analyze ./my-llama --calibration text.txt --budgets 0.1,0.25,0.5",
)
def analyze_command(
    source: Source,
    calibration: Calibration = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the parameters, as 0.1,0.25,0.5. Default: a ladder of all that are "
            "feasible.",
            show_default=False,
        ),
    ] = None,
    metric: MetricOption = None,
    include: Include = None,
    exclude: Exclude = None,
    formats: Formats = None,
    seed: Seed = 0,
    cache: Cache = None,
    max_memory: MaxMemory = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the curve: .png, .svg or .pdf.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict quality, size and cost for several budgets, without compressing anything."""
    with _errors_told():
        shares = None if budgets is None else parse_shares(budgets)
        chosen = parse_formats(formats)
        _check_plot(plot)
        _check_size(max_memory)
        with contextlib.redirect_stdout(sys.stderr):
            loaded, batches = _load(source, dtype, calibration, batch_size, max_length)
            _say(f"analysing {_count(loaded.model)} parameters")
            analysis = tensorize.analyze(
                loaded.model,
                example_inputs=loaded.example_inputs,
                calibration=batches,
                metric=None if metric is None else metric.value,
                include=include or None,
                exclude=exclude or None,
                formats=chosen,
                seed=seed,
                cache_dir=cache,
                max_memory=max_memory,
            )
            curve = analysis.curve(shares)
            if plot is not None:
                curve.plot(plot)
        if as_json:
            _print_json({"curve": curve.to_dict(), "notes": list(analysis.notes)})
            return
        typer.echo(str(curve))
        for note in analysis.notes:
            typer.echo(f"note: {note}")
        if plot is not None:
            typer.echo(f"the curve is drawn in {plot}")


@app.command(
    "calibrate", epilog="Example: tensorize calibrate; tensorize calibrate --model ./my-llama-small"
)
def calibrate_command(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Time the kernels of a saved model instead, on the GPU of this machine: models "
            "loaded afterwards run by those that beat the library, and wait for none.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="With --model: how many rows to time kernels for.")
    ] = _ROWS,
    as_json: Json = False,
) -> None:
    """Measure what matmuls cost on this machine; plans are then made for it."""
    with _errors_told():
        if model is not None:
            _calibrate_kernels(model, rows, as_json)
            return
        if rows != _ROWS:
            raise typer.BadParameter("is for kernels; give --model as well", param_hint="--rows")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measured = machine.measure(device)
        path = machine.keep(measured, device)
        if as_json:
            _print_json(asdict(measured))
            return
        typer.echo(str(measured))
        typer.echo(f"kept in {path}")


def _calibrate_kernels(directory: Path, rows: str, as_json: bool) -> None:
    counts = _counts(rows, "--rows")
    if not torch.cuda.is_available():
        raise TensorizeError(
            "kernels are timed on a GPU, and this machine has none",
            way_out="run it where the model will run; without --model this machine is measured",
        )
    with contextlib.redirect_stdout(sys.stderr):
        loaded = tensorize.load(directory, device="cuda")
        won = tensorize.tune_kernels(loaded, counts)
    found = tensorize.report(loaded)
    if as_json:
        runs_by = {site.name: [asdict(each) for each in site.runs_by] for site in found.sites}
        _print_json({"won": won, "sites": runs_by})
        return
    typer.echo(f"{won} kernels won")
    for line in found.running:
        typer.echo(f"  {line}")


@app.command("report", epilog="Example: tensorize report ./my-llama-small --html report.html")
def report_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to a saved model; reads the manifest only."""
    with _errors_told():
        _check_target(html, "--html")
        report = read_report(directory)
        if html is not None:
            report.to_html(html)
        if as_json:
            _print_json(report.to_dict())
            return
        typer.echo(str(report))
        if html is not None:
            typer.echo(f"\nreport as a page: {html}")


@app.command(
    "eval",
    epilog="Example: tensorize eval ./small ./smaller --dense ./my-llama --data text.txt "
    "--html evaluation.html",
)
def eval_command(
    dense: Annotated[
        str,
        typer.Option(
            help="The dense model: a Hugging Face directory or id, or package.module:factory.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="What to measure on: a file as for --calibration of compile; labels in it are "
            "predicted.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...", help="Where compressed models were saved.", show_default=False
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the parameters, as 0.1,0.25,0.5: also compress to these, here and now.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help="int8 or int4: one more row for every model, quantized by torchao; repeatable.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    timing: Annotated[bool, typer.Option("--time/--no-time", help="Measure times.")] = True,
    html: Annotated[
        Path | None, typer.Option(help="Also write it as a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure compressed models beside the dense one: quality, agreement, size and speed."""
    with _errors_told():
        shares = [] if budgets is None else parse_shares(budgets)
        if not shares and not sources:
            raise typer.BadParameter("name saved models, or give --budgets", param_hint="SOURCE")
        if calibration is not None and not shares:
            raise typer.BadParameter("is for --budgets; give both", param_hint="--calibration")
        _check_target(html, "--html")
        with contextlib.redirect_stdout(sys.stderr):
            loaded, learnt = _load(dense, dtype, calibration, batch_size, max_length)
            batches = read_batches(data, loaded, batch_size, max_length, labels=True)
            models: dict[str, Any] = dict(_compressed(sources or (), loaded))
            models |= {f"{printer.percent(share)} kept": share for share in shares}
            _say(f"evaluating on {len(batches)} batches from {data}")
            found = tensorize.evaluate(
                models,
                loaded.model.eval(),
                batches,
                tokenizer=loaded.tokenizer,
                calibration=learnt,
                quantize=quantize or (),
                time=timing,
            )
            if html is not None:
                found.to_html(html)
        if as_json:
            _print_json(found.to_dict())
            return
        typer.echo(str(found))
        if html is not None:
            typer.echo(f"\nevaluation as a page: {html}")


@app.command(
    "bench", epilog="Example: tensorize bench ./small --dense ./my-llama --length 256 --compiled"
)
def bench_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Where compressed models were saved.", show_default=False
        ),
    ],
    dense: Annotated[
        str,
        typer.Option(
            help="The dense model: a Hugging Face directory or id, or package.module:factory.",
            show_default=False,
        ),
    ],
    samples: Annotated[str, typer.Option(help="How many samples a call has.")] = "1,16",
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sample, where the model takes tokens.")
    ] = 128,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time them through torch.compile as well.")
    ] = False,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Time compressed models beside the dense one, in turn on this machine."""
    with _errors_told():
        counts = _counts(samples, "--samples")
        with contextlib.redirect_stdout(sys.stderr):
            loaded, _ = _load(dense, dtype, None, 1, length)
            models = _compressed(sources, loaded)
            found = speeds(
                models,
                loaded.model.eval(),
                example_inputs=example_tokens(loaded, length),
                samples=counts,
                compiled=compiled,
            )
        if as_json:
            _print_json(found.to_dict())
        else:
            typer.echo(str(found))


def main() -> None:
    """The entry point of the ``tensorize`` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


# ---------------------------------------------------------------------------- before the work


def _load(
    source: str, dtype: Dtype, calibration: Path | None, batch_size: int, max_length: int
) -> tuple[Loaded, list[Any] | str | None]:
    """The model and its calibration batches, said on the way."""
    _say(f"loading {source}")
    loaded = load_source(source, dtype)
    if calibration is None:
        return loaded, None
    if str(calibration) == "self" and not calibration.exists():
        _say("the model makes its own calibration data")
        return loaded, "self"
    batches = read_batches(calibration, loaded, batch_size, max_length)
    _say(f"calibrating on {len(batches)} batches from {calibration}")
    return loaded, batches


def _compressed(sources: Sequence[str], loaded: Loaded) -> dict[str, nn.Module]:
    """Saved models by the names of their directories, in full where two have one name."""
    models: dict[str, nn.Module] = {}
    for source in sources:
        name = Path(source).name
        models[source if name in models else name] = load_compressed(source, loaded)
    return models


def _counts(text: str, option: str) -> list[int]:
    """``1,16,256`` as numbers."""
    counts = [int(count) for count in text.split(",") if count.strip().isdigit() and int(count)]
    if len(counts) != len(text.split(",")):
        raise typer.BadParameter(f"{text!r} is no list of numbers as 1,16,256", param_hint=option)
    return counts


def _check_streams(given: Mapping[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given:
            raise typer.BadParameter(
                "needs the whole model, and --stream never loads it", param_hint=option
            )


def _stream(
    source: str,
    out: Path,
    limits: Budget,
    metric: Metric | None,
    include: list[str] | None,
    exclude: list[str] | None,
    formats: Any,
    seed: int,
    cache: Path | None,
) -> Report:
    """Compress a checkpoint a weight at a time, and say what it took."""
    _say(f"streaming {source} to {limits}")
    start = time.perf_counter()
    report = tensorize.compile_checkpoint(
        source,
        out,
        limits,
        metric=None if metric is None else metric.value,
        include=include or None,
        exclude=exclude or None,
        formats=formats,
        seed=seed,
        cache_dir=cache,
    )
    if (tokenizer := tokenizer_of(source)) is not None:
        _save_tokenizer(tokenizer, out)
    seconds, count = time.perf_counter() - start, report.totals.before.parameters
    for stage in report.history:
        _say(f"{stage.name}: {printer.seconds(stage.seconds)}: {stage.summary}")
    _say(
        f"{count:,} parameters in {printer.seconds(seconds)}, {1e6 * seconds / count:.3g} µs a "
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


def _check_target(path: Path | None, option: str) -> None:
    """Found out before the long work: whether the file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint=option)


def _check_plot(path: Path | None) -> None:
    _check_target(path, "--plot")
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{path} is no .png, .svg or .pdf", param_hint="--plot")


def _check_size(max_memory: str | None) -> None:
    try:
        parse_bytes(max_memory)
    except BudgetError as error:
        raise typer.BadParameter(str(error), param_hint="--max-memory") from error


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
        launch.check_compiler()


def _emit(
    model: nn.Module, directory: Path, targets: list[str], out: Path
) -> dict[str, dict[str, dict[str, int]]]:
    found = tensorize.kernels(model)
    _say(f"writing {len(found)} kernels for {', '.join(targets) or 'reading'}")
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
        _print_json({"directory": str(out), "report": report.to_dict(), **about})
        return
    typer.echo(str(report))
    typer.echo(f"\nsaved in {out} ({_size(out)}): {', '.join(_names(out))}")
    if html is not None:
        typer.echo(f"report as a page: {html}")
    if kernels is not None:
        typer.echo(f"{len(kernels)} kernels are in {emit}")
    typer.echo(f'load it with tensorize.load("{out}"{argument})')


def _say(line: str) -> None:
    typer.echo(f"tensorize: {line}", err=True)


def _print_json(data: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _size(directory: Path) -> str:
    return printer.bytes_(sum(p.stat().st_size for p in directory.iterdir() if p.is_file()))


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """An error as one message and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("TENSORIZE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        typer.secho("error: ", err=True, nl=False, fg="red", bold=True)
        if isinstance(error, TensorizeError):
            typer.echo(str(error), err=True)
        else:
            typer.echo(
                f"{type(error).__name__}: {error}\n  this is a defect in tensorize: "
                "TENSORIZE_DEBUG=1 shows where",
                err=True,
            )
        raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: Exception) -> int:
    if isinstance(error, BudgetError):
        return BUDGET
    if isinstance(error, CheckpointError):
        return CHECKPOINT
    return CAPTURE if isinstance(error, TensorizeError) else DEFECT


if __name__ == "__main__":
    main()
