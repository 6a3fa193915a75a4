"""The command line.

``tensorize compile | analyze | report | eval | bench | calibrate``.

Results go to standard output (``--json``: one JSON object and nothing else), everything said on the
way to standard error. Exit codes: 0 done, 2 wrong usage, 3 a model, its inputs or its calibration
data cannot be used, 4 the budget is not feasible, 5 an artefact cannot be read or written, 130
interrupted, 1 a defect. ``TENSORIZE_DEBUG=1`` shows the traceback of an error.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import tensorize
from tensorize.cli.analyze import analyze_command
from tensorize.cli.calibrate import calibrate_command
from tensorize.cli.compile import compile_command
from tensorize.cli.evaluate import bench_command, eval_command
from tensorize.cli.report import report_command
from tensorize.cli.telling import INTERRUPTED

app = typer.Typer(
    name="tensorize",
    help="Compress a PyTorch model into low-rank and tensor-train form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(tensorize.__version__)
        raise typer.Exit()


app.command(
    "compile",
    epilog="Example: tensorize compile ./my-llama --budget 0.3 --calibration text.txt "
    "--out ./my-llama-small",
)(compile_command)
app.command(
    "analyze",
    epilog="Example: tensorize analyze ./my-llama --calibration text.txt --budgets 0.1,0.25,0.5",
)(analyze_command)
app.command(
    "calibrate", epilog="Example: tensorize calibrate; tensorize calibrate --model ./my-llama-small"
)(calibrate_command)
app.command("report", epilog="Example: tensorize report ./my-llama-small --html report.html")(
    report_command
)
app.command(
    "eval",
    epilog="Example: tensorize eval ./small ./smaller --dense ./my-llama --data text.txt "
    "--html evaluation.html",
)(eval_command)
app.command(
    "bench", epilog="Example: tensorize bench ./small --dense ./my-llama --length 256 --compiled"
)(bench_command)


def main() -> None:
    """The entry point of the ``tensorize`` command."""
    for stream in (sys.stdout, sys.stderr):  # a name may have letters that a pipe has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
