"""The command line: ``tensorize compile | analyze | report``.

Results go to standard output (``--json``: one JSON object and nothing else), everything said on the
way to standard error. Exit codes: 0 done, 2 wrong usage, 3 a model, its inputs or its calibration
data cannot be used, 4 the budget is not feasible, 5 an artefact cannot be read or written, 130
interrupted, 1 a defect. ``TENSORIZE_DEBUG=1`` shows the traceback of an error.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import tensorize
from tensorize import printer
from tensorize.budget import Budget
from tensorize.checkpoint import MANIFEST, read_report
from tensorize.errors import BudgetError, CaptureError, CheckpointError, TensorizeError

app = typer.Typer(
    name="tensorize",
    help="Compress a PyTorch model into low-rank and tensor-train form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFECT, USAGE, CAPTURE, BUDGET, CHECKPOINT, INTERRUPTED = 1, 2, 3, 4, 5, 130


class Metric(StrEnum):
    """How a weight's error is weighed."""

    frobenius = "frobenius"
    input = "input"
    loss = "loss"


class Dtype(StrEnum):
    """The dtype to load the weights in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
        ".safetensors file with a tensor for each input, whose first axis is the sample.",
        show_default=False,
    ),
]
MetricOption = Annotated[
    Metric | None,
    typer.Option(help="Default: loss with calibration data, else frobenius.", show_default=False),
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
        help="dense, low_rank or tt, or PATTERN=FORMAT,...; repeatable.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the probes.")]
Cache = Annotated[
    Path | None, typer.Option(help="Directory that keeps analyses.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a calibration batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a document that are used.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load the weights in this dtype.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


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
            "loss=... (up to 1: a share; above: an absolute number)."
        ),
    ] = "0.1",
    calibration: Calibration = None,
    metric: MetricOption = None,
    include: Include = None,
    exclude: Exclude = None,
    formats: Formats = None,
    seed: Seed = 0,
    cache: Cache = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a model and save it: weights, report, and the tokenizer where there is one."""
    with _errors_told():
        limits = parse_budget(budget)
        chosen = parse_formats(formats)
        _check_target(html, "--html")
        _check_out(out, source)
        with contextlib.redirect_stdout(sys.stderr):
            loaded = _load_source(source, dtype)
            batches = _calibration(calibration, loaded, batch_size, max_length)
            _say(f"compressing {_count(loaded.model)} parameters to {limits}")
            model = tensorize.compile(
                loaded.model,
                limits,
                example_inputs=loaded.example_inputs,
                calibration=batches,
                metric=None if metric is None else metric.value,
                include=include or None,
                exclude=exclude or None,
                formats=chosen,
                inplace=True,
                seed=seed,
                cache_dir=cache,
            )
            report = tensorize.report(model)
            tensorize.save(model, out)
            if loaded.tokenizer is not None:
                _save_tokenizer(loaded.tokenizer, out)
            if html is not None:
                report.to_html(html)
        if as_json:
            _print_json({"directory": str(out), "report": report.to_dict()})
            return
        typer.echo(str(report))
        typer.echo(f"\nsaved in {out} ({_size(out)}): {', '.join(_names(out))}")
        if html is not None:
            typer.echo(f"report as a page: {html}")
        argument = "" if loaded.factory is None else f", model={loaded.factory}"
        typer.echo(f'load it with tensorize.load("{out}"{argument})')


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
        _check_target(plot, "--plot")
        with contextlib.redirect_stdout(sys.stderr):
            loaded = _load_source(source, dtype)
            batches = _calibration(calibration, loaded, batch_size, max_length)
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


def main() -> None:
    """The entry point of the ``tensorize`` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


# ------------------------------------------------------------------------------ what is written


def parse_budget(text: str) -> Budget:
    """``0.3``, or ``params=0.3,error=0.05,bytes=2e6``: a cost up to 1 is a share, else absolute.

    Raises:
        typer.BadParameter: the text is no budget.
        BudgetError: its numbers make no sense.
    """
    known = [f.name for f in fields(Budget)]
    if "=" not in text:
        return Budget.of(_number(text, "--budget"))
    limits: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value or name in limits:
            raise typer.BadParameter(
                f"{part.strip()!r} is not NAME=NUMBER with a new NAME among {', '.join(known)}",
                param_hint="--budget",
            )
        number = _number(value, "--budget")
        absolute = name not in ("error", "loss") and number > 1 and number.is_integer()
        limits[name] = int(number) if absolute else number
    return Budget(**limits)


def parse_shares(text: str) -> list[float]:
    """``0.1,0.25,0.5`` as shares in (0, 1]."""
    shares = [_number(part, "--budgets") for part in text.split(",")]
    for share in shares:
        Budget.of(share)
    return shares


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text.strip()!r} is no number", param_hint=option) from None


def parse_formats(texts: Sequence[str] | None) -> list[str] | dict[str, list[str]] | None:
    """Format names for all weights, or pattern → names."""
    if not texts:
        return None
    if not any("=" in text for text in texts):
        return [name.strip() for text in texts for name in text.split(",")]
    chosen: dict[str, list[str]] = {}
    for text in texts:
        pattern, equals, names = text.rpartition("=")
        if not equals:
            raise typer.BadParameter(
                "give formats for all weights, or a pattern with each", param_hint="--formats"
            )
        chosen[pattern.strip()] = [name.strip() for name in names.split(",")]
    return chosen


def _check_target(path: Path | None, option: str) -> None:
    """Found out before the long work: whether the file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint=option)


def _check_out(out: Path, source: str) -> None:
    if os.path.isdir(source) and out.exists() and os.path.samefile(out, source):
        raise typer.BadParameter("is the model's own directory; choose another", param_hint="--out")
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(
            f"{out} cannot be written: {place} is not a directory that you may write to",
            way_out="choose another directory with --out",
        )


# ------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Loaded:
    """A model and what came with it; ``factory`` is the call that makes it, if one does."""

    model: nn.Module
    tokenizer: Any = None
    example_inputs: Any = None
    factory: str | None = None


def _load_source(source: str, dtype: Dtype) -> _Loaded:
    _say(f"loading {source}")
    if ":" in source and not os.path.exists(source):
        return _from_factory(source, dtype)
    return _from_hugging_face(source, dtype)


def _from_factory(source: str, dtype: Dtype) -> _Loaded:
    """``package.module:factory``: a callable without arguments, or a module itself.

    Example inputs come with it as ``(model, example_inputs)`` or as ``factory.example_inputs``.
    """
    home, _, path = source.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(home)
        for part in path.split("."):
            target = getattr(target, part)
        call = callable(target) and not isinstance(target, nn.Module)
        made = target() if call else target
        inputs = getattr(target, "example_inputs", None)
        inputs = inputs() if callable(inputs) else inputs
    except Exception as error:  # whatever the caller's own code raises
        raise CaptureError(
            f"{source} cannot be called: {type(error).__name__}: {error}",
            way_out="SOURCE is package.module:factory, importable from here, where factory() "
            "gives a torch.nn.Module",
        ) from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise CaptureError(
            f"{source} gave a {type(made).__name__}, not a torch.nn.Module",
            way_out="return the model, or (model, example_inputs)",
        )
    if dtype is not Dtype.auto:
        made = made.to(getattr(torch, dtype.value))
    return _Loaded(made, None, inputs, f"{path}()" if call else path)


def _from_hugging_face(source: str, dtype: Dtype) -> _Loaded:
    local = Path(source).expanduser()
    if not local.is_dir() and (local.is_absolute() or source.startswith((".", "~"))):
        raise CaptureError(f"there is no directory {source}", way_out="check the path")
    if (local / MANIFEST).is_file():
        raise CaptureError(
            f"{source} holds a model that is compressed already",
            way_out="tensorize report shows it; compress the dense model again for another budget",
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CaptureError(
            f"{source} is taken as a Hugging Face model, and transformers is not installed",
            way_out="pip install transformers, or name a package.module:factory",
        ) from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    where = str(local) if local.is_dir() else source
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        names = getattr(config, "architectures", None) or ()
        kinds = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        kind = kinds[0] if kinds else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(where, dtype=dtype.value)
    except Exception as error:  # transformers raises whatever its parts do
        raise CaptureError(
            f"transformers cannot load {source}: {type(error).__name__}: {error}",
            way_out="check the directory or id; a model of your own is named by "
            "package.module:factory",
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except Exception:  # a model without a tokenizer (vision, audio)
        tokenizer = None
    return _Loaded(model, tokenizer)


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise CheckpointError(
            f"the model is saved in {out}, its tokenizer is not: {error}",
            way_out="copy the tokenizer's files there",
        ) from error


# --------------------------------------------------------------------------------- calibration


def _calibration(
    path: Path | None, loaded: _Loaded, batch_size: int, max_length: int
) -> list[Any] | None:
    if path is None:
        return None
    if not path.is_file():
        raise CaptureError(f"there is no calibration file {path}", way_out="check the path")
    if path.suffix == ".safetensors":
        batches = _tensor_batches(path, loaded.model, batch_size)
    else:
        batches = _text_batches(path, loaded, batch_size, max_length)
    _say(f"calibrating on {len(batches)} batches from {path}")
    return batches


def _tensor_batches(path: Path, model: nn.Module, batch_size: int) -> list[Any]:
    """Named inputs, cut along their first axis; one tensor of any name is the only input."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CaptureError(
            f"{path} is no safetensors file: {error}", way_out="write it with safetensors.torch"
        ) from error
    lengths = {name: len(t) if t.dim() else 0 for name, t in tensors.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise CaptureError(
            f"the tensors of {path} have different numbers of samples: {lengths}",
            way_out="give all of them the same first axis, the sample",
        )
    accepted = _accepted(model)
    positional = len(tensors) == 1 and accepted is not None and not accepted & tensors.keys()
    count = next(iter(lengths.values()))
    cuts = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    if positional:
        (only,) = tensors.values()
        return [(only[cut],) for cut in cuts]
    if accepted is not None and (unknown := tensors.keys() - accepted):
        raise CaptureError(
            f"{path} holds {', '.join(sorted(unknown))}, which the model's forward does not take",
            way_out=f"name the tensors as its arguments: {', '.join(sorted(accepted))}",
        )
    return [{name: tensor[cut] for name, tensor in tensors.items()} for cut in cuts]


def _accepted(model: nn.Module) -> set[str] | None:
    """The names that forward takes; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and len(parameters) == 1:
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def documents(text: str) -> list[str]:
    """Paragraphs between blank lines; lines where there is no blank line."""
    parts = re.split(r"\n[ \t]*\n", text)
    if len(parts) == 1:
        parts = text.splitlines()
    return [part.strip() for part in parts if part.strip()]


def _text_batches(
    path: Path, loaded: _Loaded, batch_size: int, max_length: int
) -> list[Mapping[str, Tensor]]:
    if loaded.tokenizer is None:
        raise CaptureError(
            f"{path} is text, and the model has no tokenizer",
            way_out="give a .safetensors file with a tensor for each input",
        )
    try:
        texts = documents(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CaptureError(
            f"{path} is not UTF-8 text: {error}", way_out="give text, or a .safetensors file"
        ) from error
    if not texts:
        raise CaptureError(f"{path} holds no text", way_out="one document a paragraph or line")
    tokenizer = copy.deepcopy(loaded.tokenizer)  # what is saved beside the model stays as it is
    accepted = _accepted(loaded.model)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    if tokenizer.pad_token is None or (accepted is not None and "attention_mask" not in accepted):
        batch_size = 1
    positions = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    longest = min(max_length, positions or max_length, tokenizer.model_max_length)
    batches = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(
            texts[start : start + batch_size],
            padding=batch_size > 1,
            padding_side="right",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        batches.append({k: v for k, v in tokens.items() if accepted is None or k in accepted})
    return batches


# ------------------------------------------------------------------------------ output, errors


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
