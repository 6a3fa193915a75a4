"""The command line.

``tensorize compile | analyze | info | report | eval | bench | heal | serve | densify | kernels |
graphs | calibrate | doctor``.

Results go to standard output (``--json``: one JSON object and nothing else), everything said on
the way to standard error (``--quiet``: nothing, ``--verbose``: more). Exit codes: 0 done, 2 wrong
usage, 3 a model, its inputs or its calibration data cannot be used, 4 the budget is not feasible,
5 an artefact cannot be read or written, 130 interrupted, 1 a defect. ``TENSORIZE_DEBUG=1`` shows
the traceback of an error.

A command's file is imported when the command is asked for, and what it works with when it runs, so
that help need not wait for torch.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import tensorize
from tensorize.base import printer, progress

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A command: its file, the first sentence of its help, and an example.

    The function in the file is called after it: ``compile_command``.
    """

    name: str
    file: str
    help: str
    example: str


COMMANDS = {
    each.name: each
    for each in (
        Command(
            "compile",
            "compile",
            "Compress a model and save it: weights, report, and the tokenizer where there is one.",
            "tensorize compile ./my-llama --budget 0.3 --calibration text.txt "
            "--out ./my-llama-small",
        ),
        Command(
            "analyze",
            "analyze",
            "Predict quality, size and cost for several budgets, without compressing anything.",
            "tensorize analyze ./my-llama --calibration text.txt --budgets 0.1,0.25,0.5",
        ),
        Command(
            "info",
            "report",
            "Say what a model is: a dense one by its weights, a saved one by its verdict.",
            "tensorize info ./my-llama; tensorize info ./my-llama-small",
        ),
        Command(
            "report",
            "report",
            "Show what was done to a saved model; reads the manifest only.",
            "tensorize report ./my-llama-small --html report.html",
        ),
        Command(
            "eval",
            "evaluate",
            "Measure compressed models beside the dense one: quality, agreement, size and speed.",
            "tensorize eval ./small ./smaller --dense ./my-llama --data text.txt "
            "--html evaluation.html",
        ),
        Command(
            "bench",
            "evaluate",
            "Time compressed models beside the dense one, in turn on this machine.",
            "tensorize bench ./small --dense ./my-llama --length 256 --compiled",
        ),
        Command(
            "heal",
            "heal",
            "Train the factors of a saved model on to the dense one's outputs, and save it.",
            "tensorize heal ./small --dense ./my-llama --data text.txt --steps 300 --out ./healed",
        ),
        Command(
            "serve",
            "serve",
            "Answer OpenAI's completions over HTTP; a small server, no engine.",
            "tensorize serve ./small --port 8017",
        ),
        Command(
            "densify",
            "look",
            "Write a saved model with dense weights again, which any tool reads.",
            "tensorize densify ./small --out ./dense-again",
        ),
        Command(
            "kernels",
            "look",
            "List the Triton kernels of a saved model, or write them.",
            "tensorize kernels ./small --out ./kernels --target cuda:90",
        ),
        Command(
            "graphs",
            "look",
            "Show what the rewrite changed in a saved model's graph.",
            "tensorize graphs ./small --svg graph.svg",
        ),
        Command(
            "calibrate",
            "machine",
            "Measure what matmuls cost on this machine; plans are then made for it.",
            "tensorize calibrate; tensorize calibrate --model ./my-llama-small",
        ),
        Command(
            "doctor",
            "machine",
            "Look at this machine: what is installed, what is known of it, what will be fast.",
            "tensorize doctor",
        ),
    )
}

_ANYWHERE = {"--quiet": "--quiet", "-q": "--quiet", "--verbose": "--verbose", "-v": "--verbose"}


_NARROW = 60
_Usual: Any = TyperGroup.context_class


class _Formatter(_Usual.formatter_class):
    """Help in two columns, and on a narrow terminal the words below the names."""

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width > _NARROW else 2, col_spacing)


class _Context(_Usual):
    formatter_class = _Formatter


class _Command(TyperCommand):
    context_class = _Context


class _Commands(TyperGroup):
    """The commands, each imported when it is asked for."""

    context_class = _Context

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = COMMANDS.get(cmd_name)
        if found is None:
            return None
        module = import_module(f"tensorize.cli.{found.file}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        named = alone.command(found.name, cls=_Command, epilog=f"Example: {found.example}")
        named(getattr(module, f"{found.name}_command"))
        return get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(each.name, each.help) for each in COMMANDS.values()])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """How much is said may stand behind the command as well."""
        first = [_ANYWHERE[arg] for arg in args if arg in _ANYWHERE]
        return super().parse_args(ctx, first + [arg for arg in args if arg not in _ANYWHERE])


app = typer.Typer(
    cls=_Commands,
    name="tensorize",
    help="Compress a PyTorch model into low-rank and tensor-train form.",
    epilog="tensorize COMMAND --help says what a command takes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Left to itself, click takes 48 to 78 columns, whatever the terminal has.
    context_settings={"terminal_width": printer.prose_width()},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing on the way, but errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what each stage did, and the log.")
    ] = False,
) -> None:
    if version:
        typer.echo(tensorize.__version__)
        raise typer.Exit()
    if quiet and verbose:
        raise typer.BadParameter("is the opposite of --verbose", param_hint="--quiet")
    progress.say_much(quiet=quiet, verbose=verbose)


def main() -> None:
    """The entry point of the ``tensorize`` command."""
    for stream in (sys.stdout, sys.stderr):  # a name may have letters that a pipe has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
