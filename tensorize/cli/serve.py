"""``tensorize serve``."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tensorize
from tensorize.base import printer
from tensorize.base.errors import CheckpointError, TensorizeError
from tensorize.cli.telling import errors_told, say

if TYPE_CHECKING:
    from tensorize.serve.http import Server
    from tensorize.serve.writer import Writer

_TOKENIZER = "tokenizer.json"


def serve_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where a model was saved.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are written at a time.")] = 8,
    longest: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt and its answer; they take memory.")
    ] = 2048,
) -> None:
    """Answer OpenAI's completions over HTTP; a small server, no engine.

    Where many ask at once, `vllm serve DIR` serves the same folder.
    """
    from tensorize.serve.writer import Writer

    with errors_told():
        with contextlib.redirect_stdout(sys.stderr):
            model = tensorize.load(source)
            totals = tensorize.report(model).totals
            about = {"parameters": totals.after.parameters, "kept": totals.share.parameters}
            tokenizer = _tokenizer_in(source)
        writer = Writer(model, tokenizer, most=batch, longest=longest, about=about)
        # What a supervisor sends ends it as Ctrl-C does: who is being answered gets the rest.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with _listening(host, port, writer) as server:
                url = f"http://{host}:{server.server_address[1]}"
                kept = printer.percent(totals.share.parameters)
                say(f"{kept} of the parameters, at {url}/v1/completions; Ctrl-C ends it")
                server.serve_forever()
        finally:
            writer.close()
            signal.signal(signal.SIGTERM, before)


def _listening(host: str, port: int, writer: Writer) -> Server:
    from tensorize.serve.http import Server

    try:
        return Server((host, port), writer)
    except OSError as error:
        raise TensorizeError(
            f"nothing can listen at {host}:{port}: {error.strerror}",
            way_out="another --port, or --port 0 for any that is free",
        ) from error


def _tokenizer_in(directory: Path) -> Any:
    file = directory / _TOKENIZER
    if not file.is_file():
        raise CheckpointError(
            f"{directory} has no {_TOKENIZER}",
            way_out="copy that of the dense model: tensorize compile does, tensorize.save cannot",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise TensorizeError(
            "reading text needs tokenizers, which is not installed",
            way_out="pip install tokenizers",
        ) from error
    return Tokenizer.from_file(str(file))
