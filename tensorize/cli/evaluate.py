"""``tensorize eval`` and ``tensorize bench``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tensorize
from tensorize.base import printer
from tensorize.cli import options as option
from tensorize.cli.telling import check_target, errors_told, parse_counts, print_json, say

if TYPE_CHECKING:
    from torch import nn

    from tensorize.cli.sources import Loaded


def eval_command(
    dense: option.DenseModel,
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
    calibration: option.Calibration = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help="int8 or int4: one more row for every model, quantized by torchao; repeatable.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Multiple choice to ask of language models: JSON lines with question, choices and "
            "answer, the right one's number from 0.",
            show_default=False,
        ),
    ] = None,
    batch_size: option.BatchSize = 8,
    max_length: option.MaxLength = 512,
    dtype: option.DtypeOption = option.Dtype.auto,
    timing: Annotated[bool, typer.Option("--time/--no-time", help="Measure times.")] = True,
    html: Annotated[
        Path | None, typer.Option(help="Also write it as a page.", show_default=False)
    ] = None,
    as_json: option.Json = False,
) -> None:
    """Measure compressed models beside the dense one: quality, agreement, size and speed."""
    from tensorize.cli.parse import parse_shares
    from tensorize.cli.sources import load_told, read_batches, read_questions

    with errors_told():
        shares = [] if budgets is None else parse_shares(budgets)
        if not shares and not sources:
            raise typer.BadParameter("name saved models, or give --budgets", param_hint="SOURCE")
        if calibration is not None and not shares:
            raise typer.BadParameter("is for --budgets; give both", param_hint="--calibration")
        check_target(html, "--html")
        with contextlib.redirect_stdout(sys.stderr):
            loaded, learnt = load_told(dense, dtype, calibration, batch_size, max_length)
            batches = read_batches(data, loaded, batch_size, max_length, labels=True)
            asked = [] if questions is None else read_questions(questions)
            models: dict[str, Any] = dict(_compressed(sources or (), loaded))
            models |= {f"{printer.percent(share)} kept": share for share in shares}
            say(f"evaluating on {len(batches)} batches from {data}")
            found = tensorize.evaluate(
                models,
                loaded.model.eval(),
                batches,
                tokenizer=loaded.tokenizer,
                calibration=learnt,
                quantize=quantize or (),
                questions=asked,
                time=timing,
            )
            if html is not None:
                found.to_html(html)
        if as_json:
            print_json(found.to_dict())
            return
        typer.echo(str(found))
        if html is not None:
            typer.echo(f"\nevaluation as a page: {html}")


def bench_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Where compressed models were saved.", show_default=False
        ),
    ],
    dense: option.DenseModel,
    samples: Annotated[str, typer.Option(help="How many samples a call has.")] = "1,16",
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sample, where the model takes tokens.")
    ] = 128,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time them through torch.compile as well.")
    ] = False,
    dtype: option.DtypeOption = option.Dtype.auto,
    as_json: option.Json = False,
) -> None:
    """Time compressed models beside the dense one, in turn on this machine."""
    from tensorize.cli.sources import example_tokens, load_told
    from tensorize.evaluation.speed import speeds

    with errors_told():
        counts = parse_counts(samples, "--samples")
        with contextlib.redirect_stdout(sys.stderr):
            loaded, _ = load_told(dense, dtype, None, 1, length)
            models = _compressed(sources, loaded)
            found = speeds(
                models,
                loaded.model.eval(),
                example_inputs=example_tokens(loaded, length),
                samples=counts,
                compiled=compiled,
            )
        if as_json:
            print_json(found.to_dict())
        else:
            typer.echo(str(found))


def _compressed(sources: Sequence[str], loaded: Loaded) -> dict[str, nn.Module]:
    """Saved models by the names of their directories, in full where two have one name."""
    from tensorize.cli.sources import load_compressed

    models: dict[str, nn.Module] = {}
    for source in sources:
        name = Path(source).name
        models[source if name in models else name] = load_compressed(source, loaded)
    return models
