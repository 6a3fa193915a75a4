"""Text of a decoder, written for several requests at once that come and go at every token.

transformers calls this continuous batching, and does it: a request joins the others as soon as
there is room, and leaves them when it has its tokens. Tables for keys and values are made once, for
so many requests of so many tokens.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorize.base.errors import TensorizeError

_PAGE = 64
"""Tokens that a request's tables grow by: the fewer, the less is held that nobody uses."""

_STEP = 256
"""Tokens of prompts that are read in one step, beside one token for every request."""

_IDLE = 0.1  # seconds between two looks for what was written, or for who left


class TooMany(Exception):
    """More requests wait than can be answered in time, or there will be no more answers."""


class Failed(Exception):
    """The model failed while it wrote; others that were written at the time failed as well."""


class Left(Exception):
    """Nobody reads what is written."""


def _nobody_leaves() -> bool:
    return False


@dataclass
class Request:
    """Tokens that follow a prompt, as they come.

    ``left`` says whether who asked is gone; ``written``: how many came; ``stopped``: the last one
    ends the text.
    """

    prompt: list[int]
    stops: frozenset[int]
    patience: float
    left: Callable[[], bool] = _nobody_leaves
    written: int = 0
    stopped: bool = False
    _told: int = 0
    _waiting: queue.Queue[int | Exception | None] = field(default_factory=queue.Queue)

    def __iter__(self) -> Iterator[int]:
        """Each token once.

        Raises:
            Failed: the model failed.
            Left: who asked is gone.
            TimeoutError: no token came for ``patience`` seconds.
        """
        since = time.monotonic()
        while True:
            if self.left():
                raise Left
            try:
                found = self._waiting.get(timeout=_IDLE)
            except queue.Empty:
                if time.monotonic() - since > self.patience:
                    raise TimeoutError from None
                continue
            since = time.monotonic()
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            self.written, self.stopped = self.written + 1, found in self.stops
            yield found

    def tell(self, tokens: Sequence[int]) -> None:
        """All that was written so far, of which the first may have been told before."""
        for token in tokens[self._told :]:
            self._waiting.put(token)
        self._told = len(tokens)

    def end(self, error: Exception | None = None) -> None:
        """Nothing follows what was told; ``error``: why not."""
        self._waiting.put(error)


class Writer:
    """Writes the likeliest tokens for at most ``most`` requests at a time; ``queued`` may wait.

    A prompt and its answer are at most ``longest`` tokens, and no more than the model can see. What
    a server tells of the model is ``about``.

    Raises:
        TensorizeError: the model writes no text by continuous batching.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        most: int = 8,
        queued: int = 256,
        longest: int = 2048,
        patience: float = 60.0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        why = _why_not(model)
        if why is not None:
            raise TensorizeError(
                f"a {type(model).__name__} is not served: {why}",
                way_out="tensorize.load(directory), in a server of your own",
            )
        self.model, self.tokenizer, self.about = model, tokenizer, dict(about or {})
        self.longest = min(longest, model.config.max_position_embeddings)
        self._most, self._queued, self._patience = most, queued, patience
        self._lock, self._closed = threading.Lock(), False
        self._live: dict[str, Request] = {}
        self._manager = self._started()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, prompt: str, tokens: int, left: Callable[[], bool] = _nobody_leaves) -> Request:
        """Ask for so many tokens after a prompt; ``left`` says whether they are for nobody now.

        Raises:
            ValueError: the prompt is empty, or too long with its answer.
            TooMany: so many wait already, or the writer is closed.
        """
        ids = self.tokenizer.encode(prompt).ids
        if not ids or tokens < 1 or len(ids) + tokens > self.longest:
            raise ValueError(f"1 to {self.longest} tokens, of prompt and answer together")
        request = Request(ids, self._stops, self._patience, left)
        with self._lock:
            if self._closed or len(self._live) >= self._most + self._queued:
                raise TooMany
            if not self._manager.is_running():  # a model that failed may do better with others
                self._manager = self._started()
            name = self._manager.add_request(ids, max_new_tokens=tokens, streaming=True)
            if name is None:
                raise TooMany
            self._live[name] = request
        return request

    def leave(self, request: Request) -> None:
        """Write no more for a request, if there is more to come."""
        with self._lock:
            for name in [name for name, each in self._live.items() if each is request]:
                del self._live[name]
                self._manager.cancel_request(name)

    def close(self) -> None:
        """Answer what waits, and stop."""
        with self._lock:
            self._closed = True
        self._manager.stop(block=True)
        self._reader.join()

    def _started(self) -> Any:
        from transformers import ContinuousBatchingConfig

        settings = copy.deepcopy(self.model.generation_config)
        settings.do_sample = False
        ends = settings.eos_token_id
        self._stops = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        blocks = self._most * math.ceil(self.longest / _PAGE)
        limits = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=blocks,
            max_batch_tokens=_STEP + self._most,
            max_requests_per_batch=self._most,
        )
        manager = self.model.init_continuous_batching(settings, limits)
        manager.start()
        return manager

    def _read(self) -> None:
        """Give every request what was written for it, until all have all of it."""
        while True:
            with self._lock:
                manager, done = self._manager, self._closed and not self._live
            if done:
                return
            found = manager.get_result(timeout=_IDLE)
            if found is not None:
                self._deliver(found)
            elif not manager.is_running():
                self._give_up(manager)

    def _deliver(self, found: Any) -> None:
        ends = found.is_finished()
        with self._lock:
            request = (self._live.pop if ends else self._live.get)(found.request_id, None)
        if request is None:
            return
        request.tell(found.generated_tokens)
        if ends:
            request.end(None if found.error is None else Failed(found.error))

    def _give_up(self, manager: Any) -> None:
        """What a manager that ended has left is never written."""
        with self._lock:
            if manager is not self._manager:
                return
            left, self._live = list(self._live.values()), {}
        for request in left:
            request.end(Failed("the model failed"))
        time.sleep(_IDLE)


def _why_not(model: Any) -> str | None:
    if not hasattr(model, "init_continuous_batching"):
        return "it writes no text, as it is no decoder of transformers"
    if model.config.is_encoder_decoder:
        return "it has an encoder, and only decoders are written with others"
    return None
