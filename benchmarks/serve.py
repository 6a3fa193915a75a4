"""A decoder in vLLM, dense and compressed: how fast it writes, and how long requests wait.

    make serve-test                                  # makes the environment
    .venv-serve/bin/python -m benchmarks.serve

A Llama of 134 M parameters with random weights, in bfloat16: dense; with a quarter of the
parameters of every weight; the same factors in int8; and every dense linear layer in int8, by us
and by torchao (its weights alone: on a CPU vLLM 0.32 reads no weights of eight bits from
compressed-tensors, but of four, and torchao's rounding of inputs is half as fast). Each is an
engine in a process of its own, eager and with one thread; rounds are interleaved. Rates are tokens
a second of the processor's time, and their ratios to dense the medians over rounds. Then requests
come at random moments at some rates: time to the first token and between tokens, in milliseconds,
as percentiles.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SIZES = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
TORCHAO = "dense in torchao's int8"  # rounded by vLLM when it loads the dense folder
KINDS = ("dense", "quarter", "quarter in int8", "dense in int8", TORCHAO)
REQUESTS, LENGTH, WRITTEN = 12, 64, 24
PERCENTILES = (50, 90, 99)


# ------------------------------------------------------------------------------------ the models


def made(folder: Path, kinds: list[str]) -> dict[str, Path]:
    """The folders of some kinds, written where they are not there."""
    import torch
    import transformers as hf

    import tensorize

    found = {}
    for name in kinds:
        found[name] = target = folder / _written(name).replace(" ", "-")
        if target.exists():
            continue
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(torch.bfloat16).eval()
        given = {"example_inputs": {"input_ids": torch.zeros(1, 8, dtype=torch.long)}}
        given |= {"progress": False}
        if name == "dense":
            model.save_pretrained(target)
        elif name == "dense in int8":
            linears = {"include": "*_proj.weight", "formats": "dense", "precision": "int8"}
            small = tensorize.compile(model, 1.0, metric="frobenius", **linears, **given)
            tensorize.save(small, target)
        else:
            # Ranks by shapes alone: a plan for random weights would give the tables up first.
            small = tensorize.initialize(model, 0.25, formats="low_rank", **given)
            tensorize.save(small if name == "quarter" else in_int8(model, small, given), target)
    return found


def _written(kind: str) -> str:
    """The kind whose folder an engine is given."""
    return "dense" if kind == TORCHAO else kind


def in_int8(model: Any, small: Any, given: dict[str, Any]) -> Any:
    """The weights of a model in factors of the ranks that another one has, in eight bits."""
    import tensorize
    from tensorize.ir.coded import QuantizedSpec

    analysis = tensorize.analyze(
        model, metric="frobenius", formats="low_rank", precision="int8", **given
    )
    plan, chosen = analysis.plan(1.0), tensorize.report(small).plan
    specs = {site.name: site.spec for site in chosen.sites if site.spec is not None}
    sites = tuple(
        replace(site, spec=QuantizedSpec(specs[site.name], "int8")) if site.name in specs else site
        for site in plan.sites
    )
    return tensorize.apply(
        model, replace(plan, sites=sites, predicted=chosen.predicted), progress=False
    )


# ------------------------------------------------------------------------------- inside an engine


def work(directory: str, kind: str) -> None:
    """Measure as often as a line is read, and answer with a line."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    engine = LLM(
        model=directory, dtype="bfloat16", max_model_len=512, max_num_seqs=16, enforce_eager=True,
        enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True, seed=0,
        **(_rounded_by_torchao() if kind == TORCHAO else {}),
    )  # fmt: skip
    _took(engine, 1, 16, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _waits(engine, asked["rate"]) if "rate" in asked else _rates(engine)
        print(json.dumps(answer), flush=True)


def _rounded_by_torchao() -> dict[str, Any]:
    from torchao.core.config import config_to_dict  # pyright: ignore[reportMissingImports]
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    how = json.dumps(config_to_dict(Int8WeightOnlyConfig()))
    return {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": how}}


def _prompts(count: int, length: int) -> list[dict[str, list[int]]]:
    words = range(3, SIZES["vocab_size"])
    return [{"prompt_token_ids": random.choices(words, k=length)} for _ in range(count)]


def _how(tokens: int) -> Any:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _took(engine: Any, count: int, length: int, tokens: int) -> float:
    """Seconds of the processor for so many prompts."""
    start = time.process_time()
    engine.generate(_prompts(count, length), _how(tokens), use_tqdm=False)
    return time.process_time() - start


def _rates(engine: Any) -> dict[str, float]:
    """Tokens a second: one sequence, eight, and a prompt."""
    one = _took(engine, 1, 16, 33) - _took(engine, 1, 16, 1)
    eight = _took(engine, 8, 16, 17) - _took(engine, 8, 16, 1)
    return {
        "decoding 1": 32 / one,
        "decoding 8": 8 * 16 / eight,
        "prefill": 2 * 256 / _took(engine, 2, 256, 1),
    }


def _waits(engine: Any, rate: float) -> dict[str, list[float]]:
    """Milliseconds to the first token and between tokens, of requests at random moments."""
    inner, draw = engine.llm_engine, random.Random(0)
    moments, now = [], 0.0
    for _ in range(REQUESTS):
        now += draw.expovariate(rate)
        moments.append(now)
    prompts = _prompts(REQUESTS, LENGTH)
    came: dict[str, list[float]] = {str(k): [] for k in range(REQUESTS)}
    start, asked = time.perf_counter(), 0
    while asked < REQUESTS or inner.has_unfinished_requests():
        elapsed = time.perf_counter() - start
        while asked < REQUESTS and moments[asked] <= elapsed:
            inner.add_request(str(asked), prompts[asked], _how(WRITTEN))
            asked += 1
        if not inner.has_unfinished_requests():
            time.sleep(max(moments[asked] - elapsed, 0))
            continue
        for output in inner.step():
            came[output.request_id].append(time.perf_counter() - start)
    first = [1e3 * (came[str(k)][0] - moments[k]) for k in range(REQUESTS)]
    between = [
        1e3 * (after - before) for times in came.values() for before, after in pairwise(times)
    ]
    return {"first": first, "between": between}


# --------------------------------------------------------------------------------------- outside


class Engine:
    """A process with one engine in it."""

    def __init__(self, directory: Path, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve", "--worker", str(directory), "--kinds", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **SETTINGS},
        )
        self._read("ready")

    def _read(self, start: str) -> str:
        """The next line that begins so: others are an engine's own."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith(start):
                return line
        raise SystemExit("an engine has ended")

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read("{"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def percentiles(values: list[float]) -> list[float]:
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return [round(cut[p - 1], 1) for p in PERCENTILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, default=Path("build/serve"), help="where they lie")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", default="1,2,4", help="requests a second; '': none")
    parser.add_argument("--kinds", default=",".join(KINDS), help="dense first")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.kinds)
        return
    from benchmarks.record import keep

    folders = made(options.models, options.kinds.split(","))
    engines = {name: Engine(folder, name) for name, folder in folders.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(options.rounds):
        for name, engine in engines.items():
            rounds[name].append(engine.ask())
    results: dict[str, Any] = {name: {} for name in engines}
    for name, found in rounds.items():
        for what in found[0]:
            ratios = [
                own[what] / base[what] for own, base in zip(found, rounds["dense"], strict=True)
            ]
            results[name][what] = {
                "tokens_a_second": statistics.median(own[what] for own in found),
                "times_dense": statistics.median(ratios),
            }
        print(name, {w: round(r["times_dense"], 2) for w, r in results[name].items()}, flush=True)
    for rate in map(float, filter(None, options.rates.split(","))):
        for name, engine in engines.items():
            found = engine.ask(rate=rate)
            waits = {what: percentiles(values) for what, values in found.items()}
            results[name][f"{rate:g} requests a second"] = waits
            print(f"{rate:g}/s", name, waits, flush=True)
    for engine in engines.values():
        engine.close()
    print(keep("serve", {"percentiles": PERCENTILES, "kinds": results}))


if __name__ == "__main__":
    main()
