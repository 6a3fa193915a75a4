"""The small server of our own: batches, errors, and what OpenAI's clients expect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib import error, request

import pytest

import tensorize
from examples import gpt, llama
from examples.serve import ask
from tensorize.serve import http


@pytest.fixture(scope="module")
def small() -> Any:
    model = llama.load_pretrained()
    return tensorize.compile(model, 0.6, metric="frobenius")


@pytest.fixture
def served(small: Any) -> Iterator[tuple[str, http.Batcher]]:
    batcher = http.Batcher(small, gpt.load_tokenizer(), most=4, wait=0.5, about={"kept": 0.6})
    with http.Server(("127.0.0.1", 0), batcher) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", batcher
        server.shutdown()
        thread.join()
    batcher.close()


PROMPTS = ("def read_file(path):", "import", "class Error(Exception):\n    ", "return x")


def test_requests_that_come_together_are_one_batch_and_get_their_own_answers(
    small: Any, served: tuple[str, http.Batcher]
) -> None:
    url, _ = served
    lengths = (9, 3, 12, 5)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda k: ask(url, PROMPTS[k], lengths[k]), range(4)))
    assert [answer["batch"] for answer in answers] == [4] * 4
    assert [answer["tokens"] for answer in answers] == list(lengths)
    tokenizer = gpt.load_tokenizer()
    for prompt, length, answer in zip(PROMPTS, lengths, answers, strict=True):
        ids = tokenizer.encode(prompt).ids
        (alone,) = http.generate(small, [ids], length)
        assert answer["text"] == tokenizer.decode(alone)


def test_more_requests_than_a_batch_holds(served: tuple[str, http.Batcher]) -> None:
    url, _ = served
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda k: ask(url, PROMPTS[k % 4], 2), range(10)))
    assert max(answer["batch"] for answer in answers) <= 4
    assert sum(answer["batch"] for answer in answers) > 10


def test_requests_that_are_too_long_together_are_answered_one_after_the_other(
    small: Any, served: tuple[str, http.Batcher]
) -> None:
    """A long prompt with a short answer, and a short prompt with a long answer."""
    url, _ = served
    longest = small.config.max_position_embeddings
    ids = gpt.load_tokenizer().encode("import os\n" * longest).ids[: longest - 8]
    long = gpt.load_tokenizer().decode(ids)
    with ThreadPoolExecutor(2) as pool:
        pairs = ((long, 1), ("import", longest // 2))
        answers = list(pool.map(lambda pair: ask(url, *pair), pairs))
    assert [answer["tokens"] for answer in answers] == [1, longest // 2]
    assert [answer["batch"] for answer in answers] == [1, 1]


def test_bad_requests_are_told_and_harm_nobody(
    served: tuple[str, http.Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, batcher = served

    def post(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            with request.urlopen(request.Request(url + path, body), timeout=30) as answer:
                return answer.status, json.load(answer)
        except error.HTTPError as failed:
            with failed:
                return failed.code, json.load(failed)

    def asked(**fields: Any) -> bytes:
        return json.dumps(fields).encode()

    assert post("/generate", b"{")[0] == 400
    assert post("/generate", b"[1]")[0] == 400
    assert post("/generate", asked(tokens=3))[0] == 400
    assert post("/generate", asked(prompt="x", tokens=10**6))[0] == 400
    assert post("/generate", asked(prompt="", tokens=3))[0] == 400
    assert post("/v1/completions", asked(prompt="x", stream=True))[0] == 400
    assert post("/v1/completions", asked(prompt="x", temperature=0.7))[0] == 400
    assert post("/v1/completions", asked(prompt=["x", "y"]))[0] == 400
    assert post("/v1/completions", asked(prompt="x", logit_bias={"1": 2}))[0] == 400
    assert post("/elsewhere", asked(prompt="x"))[0] == 404
    assert post("/generate", asked(prompt="x" * http.MOST_BYTES))[0] == 413
    with monkeypatch.context() as patch:
        patch.setattr(batcher, "model", _Failing())
        code, said = post("/generate", asked(prompt="x", tokens=2))
        assert (code, said["error"]) == (500, "RuntimeError: out of memory")
    assert post("/generate", asked(prompt="x", tokens=2))[0] == 200
    with request.urlopen(f"{url}/health") as answer:
        assert json.load(answer) == {"kept": 0.6}


def test_clients_of_openais_completions_need_not_change(
    small: Any, served: tuple[str, http.Batcher]
) -> None:
    url, _ = served
    body = {"model": "any", "prompt": PROMPTS[0], "max_tokens": 5, "temperature": 0, "n": 1}
    with request.urlopen(f"{url}/v1/completions", json.dumps(body).encode(), timeout=30) as said:
        found = json.load(said)
    ids = gpt.load_tokenizer().encode(PROMPTS[0]).ids
    (alone,) = http.generate(small, [ids], 5)
    (choice,) = found["choices"]
    assert found["object"] == "text_completion"
    assert choice["text"] == gpt.load_tokenizer().decode(alone)
    assert choice["finish_reason"] == "length"
    usage = {"prompt_tokens": len(ids), "completion_tokens": 5, "total_tokens": len(ids) + 5}
    assert found["usage"] == usage
    with request.urlopen(f"{url}/v1/models", timeout=30) as said:
        assert json.load(said)["data"][0]["id"] == found["model"]


class _Failing:
    """A model that cannot generate."""

    config = llama.build().config

    def generate(self, **options: Any) -> Any:
        raise RuntimeError("out of memory")


def test_what_waits_is_answered_when_the_server_closes(small: Any) -> None:
    batcher = http.Batcher(small, gpt.load_tokenizer(), most=2, wait=0.0)
    waiting = [batcher.submit("x", 2) for _ in range(5)]
    batcher.close()
    assert [future.result(0).tokens for future in waiting] == [2] * 5
    with pytest.raises(http.TooMany):
        batcher.submit("x", 2)
