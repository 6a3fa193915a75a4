"""transformers' own server (`transformers serve`) with a compressed folder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib import error, request

import pytest
import torch
import transformers as hf
from transformers.utils.import_utils import is_serve_available

import tensorize
from examples import gpt, llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(),
        reason="transformers' server needs fastapi: .venv-serve has it (`make serve-test-all`)",
    ),
    pytest.mark.filterwarnings("ignore"),  # of transformers and fastapi
]

PROMPT, TOKENS = "def read_file(path):", 12
WITH_US = "import tensorize, transformers.cli.transformers as cli; cli.main()"
WITHOUT = "import transformers.cli.transformers as cli; cli.main()"
BATCHES = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = tensorize.compile(llama.load_pretrained(), 0.6, metric="frobenius", progress=False)
    made = tmp_path_factory.mktemp("served")
    tensorize.save(small, made)
    hf.PreTrainedTokenizerFast(tokenizer_object=gpt.load_tokenizer()).save_pretrained(made)
    return made


@contextmanager
def serving(program: str, folder: Path, options: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", program, "serve", str(folder), "--port", str(port), *options]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def answer(url: str, folder: Path, log: Path) -> dict[str, Any]:
    """Of a server, once it listens."""
    asked = {"model": str(folder), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    sent = request.Request(
        f"{url}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 180
    while True:
        try:
            with request.urlopen(sent, timeout=120) as found:
                return json.load(found)
        except error.HTTPError:
            raise
        except error.URLError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


@pytest.mark.parametrize("options", [(), BATCHES], ids=["alone", "continuous batching"])
def test_it_writes_the_text_of_the_folder(
    options: Sequence[str], folder: Path, tmp_path: Path
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = gpt.load_tokenizer()
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    how = {"max_new_tokens": TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    (made,) = model.generate(ids, pad_token_id=0, **how)
    log = tmp_path / "log"
    with serving(WITH_US, folder, options, log) as url:
        (choice,) = answer(url, folder, log)["choices"]
    assert choice["text"] == tokenizer.decode(made[ids.shape[1] :].tolist())


def test_without_tensorize_it_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    """And writes no text."""
    log = tmp_path / "log"
    with serving(WITHOUT, folder, (), log):
        deadline = time.monotonic() + 180
        while "import tensorize" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
    assert "run `import tensorize` before from_pretrained" in log.read_text()
