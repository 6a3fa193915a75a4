"""The small server of our own: requests come and go at every token, and clients need not change."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib import error, request

import pytest
import torch
from torch import nn

import tensorize
from examples import gpt, llama
from examples.serve import ask
from tensorize.base.errors import TensorizeError
from tensorize.serve import http
from tensorize.serve.writer import Failed, Request, TooMany, Writer

PROMPTS = ("def read_file(path):", "import", "class Error(Exception):\n    ", "return x")


@pytest.fixture(scope="module")
def small() -> Any:
    return tensorize.compile(llama.load_pretrained(), 0.6, metric="frobenius")


@pytest.fixture(scope="module")
def alone(small: Any) -> dict[str, list[int]]:
    """Forty of the likeliest tokens after each prompt, by generate."""
    return {prompt: generated(small, prompt, 40) for prompt in PROMPTS}


@torch.no_grad()
def generated(model: Any, prompt: str, tokens: int) -> list[int]:
    ids = torch.tensor([gpt.load_tokenizer().encode(prompt).ids])
    how = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, pad_token_id=0, **how)[0, ids.shape[1] :].tolist()


def broken(*_: Any, **__: Any) -> Any:
    """A forward that fails."""
    raise RuntimeError("out of memory")


class Counted:
    """A forward that takes its time, and how often it was called."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.calls, self._forward = 0, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        time.sleep(0.01)
        return self._forward(*args, **kwargs)

    def when_done(self) -> int:
        """The calls, once there are no more."""
        seen = -1
        while seen != self.calls:
            seen = self.calls
            time.sleep(0.5)
        return seen


@pytest.fixture
def slow(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The model of the writer."""
    made = Counted(writer.model.forward)
    monkeypatch.setattr(writer.model, "forward", made)
    return made


@pytest.fixture
def writer(small: Any) -> Iterator[Writer]:
    made = Writer(small, gpt.load_tokenizer(), most=4, queued=6, patience=30, about={"kept": 0.6})
    yield made
    made.close()


@pytest.fixture
def url(writer: Writer) -> Iterator[str]:
    with http.Server(("127.0.0.1", 0), writer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


# ------------------------------------------------------------------------------------ the writing


def test_each_gets_the_tokens_that_it_would_get_alone(
    writer: Writer, alone: dict[str, list[int]]
) -> None:
    lengths = (9, 40, 3, 12)
    asked = [writer.ask(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    for prompt, length, each in zip(PROMPTS, lengths, asked, strict=True):
        assert list(each) == alone[prompt][:length]
        assert (each.written, each.stopped) == (length, False)


def test_who_comes_later_does_not_wait_for_who_came_before(writer: Writer) -> None:
    """A short request that comes while a long one is written is answered before it ends."""
    long = iter(writer.ask(PROMPTS[0], 40))
    next(long)
    short = writer.ask(PROMPTS[1], 2)
    assert len(list(short)) == 2
    assert len(list(long)) > 10, "it was written to its end meanwhile"


def test_more_than_are_written_at_a_time_wait_and_too_many_are_told(writer: Writer) -> None:
    asked = [writer.ask(PROMPTS[k % 4], 5) for k in range(10)]
    with pytest.raises(TooMany):
        writer.ask("x", 2)
    assert [len(list(each)) for each in asked] == [5] * 10
    assert len(list(writer.ask("x", 2))) == 2


def test_text_that_ends_before_its_length_says_so(small: Any, alone: dict[str, list[int]]) -> None:
    wanted = alone[PROMPTS[0]]
    end = next(token for k, token in enumerate(wanted) if k > 3 and token not in wanted[:k])
    given = small.generation_config.eos_token_id
    small.generation_config.eos_token_id = end
    writer = Writer(small, gpt.load_tokenizer(), most=1, patience=30)
    try:
        found = writer.ask(PROMPTS[0], 40)
        assert list(found) == wanted[: wanted.index(end) + 1]
        assert found.stopped
    finally:
        writer.close()
        small.generation_config.eos_token_id = given


def test_a_model_that_failed_is_asked_again(
    writer: Writer, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer.model, "forward", broken)
        with pytest.raises(Failed, match="out of memory"):
            list(writer.ask(PROMPTS[1], 4))
    assert list(writer.ask(PROMPTS[1], 4)) == alone[PROMPTS[1]][:4]


def test_what_waits_is_answered_when_it_closes(small: Any) -> None:
    writer = Writer(small, gpt.load_tokenizer(), most=2, patience=30)
    waiting = [writer.ask("x", 2) for _ in range(5)]
    writer.close()
    assert [len(list(each)) for each in waiting] == [2] * 5
    with pytest.raises(TooMany):
        writer.ask("x", 2)


def test_what_writes_no_text_is_refused() -> None:
    with pytest.raises(TensorizeError, match="Linear is not served: it writes no text"):
        Writer(nn.Linear(2, 2), None)


def test_halves_of_characters_wait_for_the_rest() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", "replace")

    asked = Request([1], frozenset(), patience=1.0)
    asked.tell("aé€".encode())
    asked.end()
    assert list(http.texts(asked, Bytes())) == ["a", "é", "€"]
    cut = Request([1], frozenset(), patience=1.0)
    cut.tell("a€".encode()[:-1])
    cut.end()
    assert list(http.texts(cut, Bytes())) == ["a", "\ufffd"]


# ------------------------------------------------------------------------------------- the server


def test_bad_requests_are_told_and_harm_nobody(
    url: str, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            with request.urlopen(request.Request(url + path, body), timeout=30) as answer:
                return answer.status, json.load(answer)
        except error.HTTPError as failed:
            with failed:
                return failed.code, json.load(failed)

    def asked(**fields: Any) -> bytes:
        return json.dumps(fields).encode()

    path = "/v1/completions"
    assert post(path, b"{")[0] == 400
    assert post(path, b"[1]")[0] == 400
    assert post(path, asked(max_tokens=3))[0] == 400
    assert post(path, asked(prompt="x", max_tokens=10**6))[0] == 400
    assert post(path, asked(prompt="", max_tokens=3))[0] == 400
    assert post(path, asked(prompt="x", temperature=0.7))[0] == 400
    assert post(path, asked(prompt=["x", "y"]))[0] == 400
    assert post(path, asked(prompt="x", logit_bias={"1": 2}))[0] == 400
    assert post("/elsewhere", asked(prompt="x"))[0] == 404
    assert post(path, asked(prompt="x" * http.MOST_BYTES))[0] == 413
    with monkeypatch.context() as patch:
        patch.setattr(writer.model, "forward", broken)
        for stream in (False, True):
            code, said = post(path, asked(prompt="x", max_tokens=2, stream=stream))
            assert code == 500
            assert "out of memory" in said["error"]
    assert post(path, asked(prompt="x", max_tokens=2))[0] == 200
    with request.urlopen(f"{url}/health") as answer:
        assert json.load(answer) == {"kept": 0.6}


def test_clients_of_openais_completions_need_not_change(
    url: str, alone: dict[str, list[int]]
) -> None:
    found = ask(url, PROMPTS[0], 5)
    tokenizer = gpt.load_tokenizer()
    (choice,) = found["choices"]
    assert found["object"] == "text_completion"
    assert choice["text"] == tokenizer.decode(alone[PROMPTS[0]][:5])
    assert choice["finish_reason"] == "length"
    count = len(tokenizer.encode(PROMPTS[0]).ids)
    usage = {"prompt_tokens": count, "completion_tokens": 5, "total_tokens": count + 5}
    assert found["usage"] == usage
    with request.urlopen(f"{url}/v1/models", timeout=30) as said:
        assert json.load(said)["data"][0]["id"] == found["model"]


def streamed(url: str, prompt: str, tokens: int) -> HTTPResponse:
    """An answer whose events are still to come."""
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True}).encode()
    return request.urlopen(request.Request(f"{url}/v1/completions", body), timeout=30)


def choices_in(events: bytes) -> list[dict[str, Any]]:
    """What is in the events of a whole answer, which has its end."""
    lines = events.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]


def text_in(events: bytes) -> str:
    return "".join(choice["text"] for choice in choices_in(events))


def test_text_is_streamed(url: str) -> None:
    with streamed(url, PROMPTS[0], 8) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        events = answer.read()
    choices = choices_in(events)
    assert text_in(events) == ask(url, PROMPTS[0], 8)["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) > 3


def test_an_event_is_sent_before_the_next_is_written(
    url: str, writer: Writer, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model waits in the middle of a text until the client has read its first event."""
    read, calls, forward = threading.Event(), itertools.count(), writer.model.forward
    in_time: list[bool] = []

    def waits(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            in_time.append(read.wait(5))
        return forward(*args, **kwargs)

    monkeypatch.setattr(writer.model, "forward", waits)
    with streamed(url, PROMPTS[0], 40) as answer:
        first = answer.readline()
        read.set()
        found = text_in(first + answer.read())
    assert in_time == [True]
    assert found == gpt.load_tokenizer().decode(alone[PROMPTS[0]])


def test_several_clients_at_once(url: str, alone: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: ask(url, PROMPTS[k % 4], 6), range(8)))
    tokenizer = gpt.load_tokenizer()
    for k, each in enumerate(found):
        assert each["choices"][0]["text"] == tokenizer.decode(alone[PROMPTS[k % 4]][:6])


@pytest.mark.parametrize(
    ("stream", "begun"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_nothing_is_written_for_who_left(
    stream: bool,
    begun: bool,
    url: str,
    slow: Counted,
    alone: dict[str, list[int]],
) -> None:
    """While text is streamed or waited for, and before there is any; others get their own."""
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 200, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall((head + body).encode())
        while begun and slow.calls < 5:
            time.sleep(0.01)
        if stream and begun:
            assert b"200 OK" in client.recv(1000)
    found = ask(url, PROMPTS[1], 6)["choices"][0]["text"]
    assert found == gpt.load_tokenizer().decode(alone[PROMPTS[1]][:6])
    assert slow.when_done() < 100


def test_one_of_several_leaves_and_the_others_have_their_text(
    url: str, slow: Counted, alone: dict[str, list[int]]
) -> None:
    """All are in the middle of theirs, one step of the model writing for all of them."""
    stays, leaves, waits = (streamed(url, PROMPTS[k], n) for k, n in ((1, 40), (0, 200), (2, 40)))
    with stays, waits:
        heard = {each: each.readline() for each in (stays, leaves, waits)}
        leaves.close()
        tokenizer = gpt.load_tokenizer()
        for each, prompt in ((stays, PROMPTS[1]), (waits, PROMPTS[2])):
            assert text_in(heard[each] + each.read()) == tokenizer.decode(alone[prompt])
    assert slow.when_done() < 100


def test_who_is_served_when_it_stops_has_the_whole_text(
    url: str, writer: Writer, slow: Counted, alone: dict[str, list[int]]
) -> None:
    """Streamed or waited for; who comes later is told."""
    tokenizer = gpt.load_tokenizer()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, url, PROMPTS[1], 40)
        while slow.calls < 2:
            time.sleep(0.01)
        with streamed(url, PROMPTS[0], 40) as answer:
            first = answer.readline()
            assert not waiting.done()
            writer.close()
            assert text_in(first + answer.read()) == tokenizer.decode(alone[PROMPTS[0]])
        assert waiting.result()["choices"][0]["text"] == tokenizer.decode(alone[PROMPTS[1]])
    with pytest.raises(error.HTTPError, match="503") as late:
        ask(url, PROMPTS[0], 2)
    late.value.close()


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_server_that_is_ended_gives_the_rest_of_what_it_writes(
    sent: signal.Signals, small: Any, tmp_path: Path
) -> None:
    tensorize.save(small, tmp_path)
    gpt.load_tokenizer().save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-m", "tensorize.cli", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "/v1/completions" in line)
        url = line[line.index("http://") : line.index("/v1/completions")]
        body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 200, "stream": True})
        with request.urlopen(f"{url}/v1/completions", body.encode(), timeout=60) as answer:
            first = answer.readline()
            process.send_signal(sent)
            rest = answer.read().decode()
        process.wait(timeout=60)
    assert first.startswith(b"data: {")
    assert rest.endswith("data: [DONE]\n\n")
    assert '"finish_reason": "length"' in rest
