"""A decoder behind a plain HTTP endpoint.

``/v1/completions`` and ``/v1/models`` are those of OpenAI's API, so that its clients need not
change: one prompt, as text, and the likeliest tokens, at once or as they come (``stream``). What
else a client may ask for (samples, several choices, stops) is refused, and not left out in silence.

Nothing but the standard library serves, and ``writer.py`` writes for all requests together. It is
small: one process, one thread that computes, no keys, no limits for single clients. An engine such
as vLLM serves more of them.

Answers: 400 a request that cannot be read; 404 another path; 413 too long; 500 the model failed;
503 too many wait, or the server is closing. ``GET /health`` tells what is served.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tensorize.serve.writer import Failed, Left, Request, TooMany, Writer

MOST_BYTES = 64_000  # of the body of a request
NAME = "compressed"  # of the model, to OpenAI's clients
READ = ("model", "prompt", "max_tokens", "user", "seed", "stream")
DONE: dict[str, tuple[object, ...]] = {
    "temperature": (0,), "n": (1,), "best_of": (1,), "top_p": (1,), "echo": (False,),
    "stop": ([],), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip
"""What OpenAI's clients may say of completions: anything, or the only values that are done."""

_HALF = "\ufffd"
"""What stands for the first bytes of a character whose last ones are in the next token."""


class Server(ThreadingHTTPServer):
    """An HTTP server whose requests go to one writer."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], writer: Writer) -> None:
        super().__init__(address, Handler)
        self.writer = writer


def completion(asked: dict[str, Any]) -> tuple[str, int, bool]:
    """The prompt, the number of tokens, and whether they are wanted as they come.

    Raises:
        ValueError: something is asked for that this server does not do.
    """
    for option, value in asked.items():
        if value not in (None, *DONE.get(option, (value,) if option in READ else ())):
            raise ValueError(f"{option}={value!r} is not done here")
    if not isinstance(asked["prompt"], str):
        raise ValueError("prompt is one text")
    given = asked.get("max_tokens")
    return asked["prompt"], 16 if given is None else int(given), bool(asked.get("stream"))


def texts(request: Request, tokenizer: Any) -> Iterator[str]:
    """What is written, in pieces that are whole characters."""
    ids: list[int] = []
    said = ""
    for token in request:
        ids.append(token)
        text = tokenizer.decode(ids)
        if len(text) > len(said) and not text.endswith(_HALF):
            yield text[len(said) :]
            said = text
    if text := tokenizer.decode(ids)[len(said) :]:
        yield text


def completed(text: str, reason: str | None, name: str) -> dict[str, Any]:
    """Text as OpenAI's completions have it; ``reason``: why it ends here, None: it does not."""
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    return {
        "id": name,
        "object": "text_completion",
        "created": int(time.time()),
        "model": NAME,
        "choices": [choice],
    }


def _reason(request: Request) -> str:
    return "stop" if request.stopped else "length"


class Handler(BaseHTTPRequestHandler):
    """One request: JSON in, JSON out."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            data = {"id": NAME, "object": "model", "owned_by": "tensorize"}
            self._say(200, {"object": "list", "data": [data]})
            return
        if self.path != "/health":
            self._say(404, {"error": f"there is no {self.path}"})
            return
        self._say(200, self._writer.about)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal():
            self.close_connection = True
            self._say(400, {"error": f"Content-Length: {length}"})
            return
        length = int(length)
        if length > MOST_BYTES:
            self.close_connection = True  # the body is not read
            self._say(413, {"error": f"at most {MOST_BYTES} bytes"})
            return
        body = self.rfile.read(length)
        if self.path != "/v1/completions":
            self._say(404, {"error": f"there is no {self.path}"})
            return
        try:
            prompt, tokens, stream = completion(json.loads(body))
            request = self._writer.ask(prompt, tokens, self._left)
            try:
                self._complete(request, stream)
            finally:
                self._writer.leave(request)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._say(400, {"error": f"{type(error).__name__}: {error}"})
        except (TooMany, TimeoutError):
            self._say(503, {"error": "too many requests, try again"})
        except (ConnectionError, Left):
            self.close_connection = True
        except Failed as error:
            self._say(500, {"error": f"{type(error).__name__}: {error}"})

    def _complete(self, request: Request, stream: bool) -> None:
        pieces = texts(request, self._writer.tokenizer)
        name = f"cmpl-{uuid.uuid4().hex}"
        if stream:
            self._stream(pieces, request, name)
        else:
            self._answer("".join(pieces), request, name)

    def _left(self) -> bool:
        """Whether the client has closed its end."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _answer(self, text: str, request: Request, name: str) -> None:
        made = completed(text, _reason(request), name)
        made["usage"] = {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": request.written,
            "total_tokens": len(request.prompt) + request.written,
        }
        self._say(200, made)

    def _stream(self, pieces: Iterator[str], request: Request, name: str) -> None:
        """Server-sent events, one a piece; what fails before the first is an answer of its own."""
        first = next(pieces, "")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in itertools.chain((first,), pieces):
                self._event(json.dumps(completed(piece, None, name)))
            self._event(json.dumps(completed("", _reason(request), name)))
        except (TimeoutError, Failed) as error:
            self._event(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    @property
    def _writer(self) -> Writer:
        return cast(Server, self.server).writer

    def _say(self, code: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not written down."""
