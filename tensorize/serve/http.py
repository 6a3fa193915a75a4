"""A decoder behind a plain HTTP endpoint, with requests answered in batches.

``/v1/completions`` and ``/v1/models`` are those of OpenAI's API, so that its clients need not
change: one prompt, as text, and the likeliest tokens. What else a client may ask for (streams,
samples, several choices, stops) is refused, and not left out in silence. ``/generate`` says with
how many others a request was answered.

Nothing but the standard library serves. A request waits a few milliseconds for others; those that
came together are one batch of the model, padded on the left, and each gets as many tokens as it
asked for. A batch is answered whole before the next one begins: an engine such as vLLM, which lets
requests come and go at every token, serves more of them.

Answers of ``/generate``: 200 ``{"text": …, "tokens": …, "batch": …, "prompt": …}``; 400 a request
that cannot be read; 404 another path; 413 too long; 500 the model failed; 503 too many wait, or the
server is closing. ``GET /health`` tells what is served.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import torch

MOST_BYTES = 64_000  # of the body of a request
PATIENCE = 60.0  # seconds until a waiting request is given up
NAME = "compressed"  # of the model, to OpenAI's clients
READ = ("model", "prompt", "max_tokens", "user", "seed")
DONE: dict[str, tuple[object, ...]] = {
    "stream": (False,), "temperature": (0,), "n": (1,), "best_of": (1,), "top_p": (1,),
    "echo": (False,), "stop": ([],), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip
"""What OpenAI's clients may say of completions: anything, or the only values that are done."""


@dataclass(frozen=True)
class Answer:
    """The text that follows a prompt, its tokens and the prompt's, and how many requests were
    answered with it."""

    text: str
    tokens: int
    batch: int
    prompt: int


@dataclass
class Waiting:
    """A request that waits for its answer."""

    ids: list[int]
    tokens: int
    answer: Future[Answer] = field(default_factory=Future)


class TooMany(Exception):
    """More requests wait than can be answered in time."""


class Batcher:
    """Collects requests and answers them together, in a thread of its own.

    The first of a batch waits at most ``wait`` seconds for others, of which there are at most
    ``most``; at most ``queued`` requests wait at all. ``about`` is what ``GET /health`` tells.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        most: int = 8,
        wait: float = 0.01,
        queued: int = 256,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.about = model, tokenizer, dict(about or {})
        self._most, self._wait = most, wait
        self._queue: queue.Queue[Waiting | None] = queue.Queue(queued)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prompt: str, tokens: int) -> Future[Answer]:
        """Ask for so many tokens after a prompt.

        Raises:
            ValueError: the prompt is empty, or too long with its answer.
            TooMany: the queue is full, or closed.
        """
        ids = self.tokenizer.encode(prompt).ids
        longest = self.model.config.max_position_embeddings
        if not ids or tokens < 1 or len(ids) + tokens > longest:
            raise ValueError(f"1 to {longest} tokens, of prompt and answer together")
        waiting = Waiting(ids, tokens)
        if not self._thread.is_alive():
            raise TooMany
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise TooMany from None
        return waiting.answer

    def close(self) -> None:
        """Answer what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting = self._queue.get()
        while waiting is not None:
            batch, after = self._gathered(waiting)
            self._answer(batch)
            # What came last was of no batch yet: the first of the next one, or the end.
            waiting = after.pop() if after else self._queue.get()

    def _gathered(self, first: Waiting) -> tuple[list[Waiting], list[Waiting | None]]:
        """Requests to answer together, and one that does not go with them, where there is one."""
        batch, end = [first], time.monotonic() + self._wait
        longest = self.model.config.max_position_embeddings
        while len(batch) < self._most:
            try:
                following = self._queue.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                break
            if following is None:
                return batch, [None]
            together = [*batch, following]
            if max(len(w.ids) for w in together) + max(w.tokens for w in together) > longest:
                return batch, [following]  # a prompt of one and the answer of another are too long
            batch = together
        return batch, []

    def _answer(self, batch: Sequence[Waiting]) -> None:
        try:
            texts = generate(self.model, [w.ids for w in batch], max(w.tokens for w in batch))
        except Exception as error:  # whatever the model raises must not end the thread
            for waiting in batch:
                waiting.answer.set_exception(error)
            return
        for waiting, ids in zip(batch, texts, strict=True):
            own = ids[: waiting.tokens]
            text = self.tokenizer.decode(own)
            waiting.answer.set_result(Answer(text, len(own), len(batch), len(waiting.ids)))


@torch.no_grad()
def generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all prompts in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return made[:, width:].tolist()


# ------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    """An HTTP server whose requests go to one batcher."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], batcher: Batcher) -> None:
        super().__init__(address, Handler)
        self.batcher = batcher


def generation(asked: dict[str, Any]) -> tuple[str, int]:
    """The prompt and the number of tokens that ``/generate`` is asked for."""
    return str(asked["prompt"]), int(asked.get("tokens", 32))


def completion(asked: dict[str, Any]) -> tuple[str, int]:
    """The same of OpenAI's completions.

    Raises:
        ValueError: something is asked for that this server does not do.
    """
    for option, value in asked.items():
        if value not in (None, *DONE.get(option, (value,) if option in READ else ())):
            raise ValueError(f"{option}={value!r} is not done here")
    if not isinstance(asked["prompt"], str):
        raise ValueError("prompt is one text")
    given = asked.get("max_tokens")
    return asked["prompt"], 16 if given is None else int(given)


def completed(answer: Answer) -> dict[str, Any]:
    """An answer as OpenAI's completions have it."""
    choice = {"text": answer.text, "index": 0, "logprobs": None, "finish_reason": "length"}
    usage = {
        "prompt_tokens": answer.prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt + answer.tokens,
    }
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": NAME,
        "choices": [choice],
        "usage": usage,
    }


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
        self._say(200, self._batcher.about)

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
        if self.path not in ("/generate", "/v1/completions"):
            self._say(404, {"error": f"there is no {self.path}"})
            return
        openai = self.path == "/v1/completions"
        try:
            asked = json.loads(body)
            prompt, tokens = completion(asked) if openai else generation(asked)
            answer = self._batcher.submit(prompt, tokens).result(PATIENCE)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._say(400, {"error": f"{type(error).__name__}: {error}"})
        except (TooMany, TimeoutError):
            self._say(503, {"error": "too many requests, try again"})
        except Exception as error:  # what the model raised
            self._say(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._say(200, completed(answer) if openai else vars(answer))

    @property
    def _batcher(self) -> Batcher:
        return cast(Server, self.server).batcher

    def _say(self, code: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not written down."""
