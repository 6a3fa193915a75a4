"""A compressed decoder behind a plain HTTP endpoint, asked by several clients at once.

    python -m examples.serve --port 8000
    curl -d '{"prompt": "def read_file(path):", "max_tokens": 32}' localhost:8000/v1/completions

The server is that of ``tensorize serve`` (``tensorize/serve/http.py`` says what it answers).
Without ``--model`` the small Llama of the repository is compressed first.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib import request

from tokenizers import Tokenizer

import tensorize
from examples import gpt, llama, stdlib_text
from tensorize.base.printer import count, percent
from tensorize.serve.http import Server
from tensorize.serve.writer import Writer

PATIENCE = 60.0  # seconds


def ask(url: str, prompt: str, tokens: int) -> dict[str, Any]:
    """One request to a server, answered."""
    body = json.dumps({"prompt": prompt, "max_tokens": tokens}).encode()
    path = f"{url}/v1/completions"
    with request.urlopen(request.Request(path, body), timeout=PATIENCE) as answer:
        return json.load(answer)


# ---------------------------------------------------------------------------------------- the run


def compressed(directory: Path | None, budget: float, documents: int) -> Any:
    """A model that was saved, or the repository's Llama, compressed on real text."""
    if directory is not None:
        return tensorize.load(directory)
    tokenizer = gpt.load_tokenizer()
    texts = [d.text for d in stdlib_text.documents("train")[:documents]]
    windows = gpt.encode(tokenizer, texts).unfold(0, 256, 256)[: 4 * documents]
    batches = [{"input_ids": part} for part in windows.split(8)]
    return tensorize.compile(llama.load_pretrained(), budget, calibration=batches, refine=None)


def tokenizer_in(directory: Path | None) -> Any:
    """The tokenizer of a saved model; that of the repository's Llama where it has none."""
    file = None if directory is None else directory / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file and file.exists() else gpt.load_tokenizer()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Serve; with ``--requests`` ask that many at once, print what it took, and stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="what tensorize.save wrote")
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with tokenizer.json; or the model's"
    )
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--documents", type=int, default=16, help="to calibrate on")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch", type=int, default=8, help="requests that are written at a time")
    parser.add_argument("--requests", type=int, default=0, help="ask them, and stop")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    model = compressed(options.model, options.budget, options.documents)
    totals = tensorize.report(model).totals
    writer = Writer(
        model,
        tokenizer_in(options.tokenizer or options.model),
        most=options.batch,
        about={"parameters": totals.after.parameters, "kept": totals.share.parameters},
    )
    with Server((options.host, options.port), writer) as server:
        url = f"http://{options.host}:{server.server_address[1]}"
        kept = percent(totals.share.parameters)
        print(f"{count(totals.after.parameters)} parameters, {kept} of the dense model, at {url}")
        try:
            if not options.requests:
                server.serve_forever()
                return {}
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found = measured(url, options.requests, options.tokens)
            server.shutdown()
        except KeyboardInterrupt:
            return {}
        finally:
            writer.close()
    print(
        f"{options.requests} requests at once: {found['tokens_per_second']:.0f} tokens a second, "
        f"{found['seconds']:.2f} s"
    )
    return found


def measured(url: str, requests: int, tokens: int) -> dict[str, float]:
    """Ask for the continuation of some texts, all at once."""
    texts = [d.text[:80] for d in stdlib_text.documents("held_out")]
    prompts = [texts[k % len(texts)] for k in range(requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        answers = list(pool.map(lambda prompt: ask(url, prompt, tokens), prompts))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_second": sum(a["usage"]["completion_tokens"] for a in answers) / seconds,
    }


if __name__ == "__main__":
    main()
