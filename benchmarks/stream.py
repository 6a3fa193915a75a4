"""A checkpoint of 1.5 B parameters, compressed by the command line under 4 GB, killed once.

    python -m benchmarks.stream
    python -m benchmarks.stream --metric loss

Makes random Llama-shaped checkpoints in bfloat16, shard by shard, and compresses them with
`tensorize compile --stream` in a process of its own, whose largest resident memory the system
counts. The large one is killed at a random moment and goes on. A small one is compressed twice,
once killed and once not, and the two results are compared byte by byte. Weights get a spectrum as
trained ones have: random ones of full rank would be the same work. With ``--metric loss`` 16 k
random tokens go through the layers (2 k through those of the small one), and the small result is
compared with that of the model in memory as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import keep

LARGE: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MOST_MEMORY = {"frobenius": 4e9, "loss": 5e9}
TOKENS = {"small": (16, 128), "large": (32, 512)}
BATCH = 4
_SHARD = 500_000_000  # bytes


# -------------------------------------------------------------------------------- the checkpoint


def make(directory: Path, sizes: dict[str, Any], seed: int = 0) -> int:
    """Write a random checkpoint, one shard in memory at a time; its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        save_file(
            {n: _drawn(shapes[n], generator) for n in shard}, directory / file, {"format": "pt"}
        )
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 2 * torch.Size(shape).numel()
        if shard and size + own > _SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += own
    yield shard


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Columns that fall off, so that some directions matter more than others."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    sizes = torch.linspace(0, -3, shape[1]).exp()
    return (torch.randn(shape, generator=generator) * sizes / shape[1] ** 0.5).bfloat16()


def write_tokens(file: Path, sizes: dict[str, Any], shape: tuple[int, int]) -> Path:
    """Texts of random tokens, as calibration data."""
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(sizes["vocab_size"], shape, generator=generator)}, file)
    return file


# -------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """One process: how it ended, what it held and took, and the last that it said."""

    code: int
    peak_bytes: int
    seconds: float
    processor_seconds: float
    said: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is compressed, and how."""

    source: Path
    budget: float
    tokens: Path | None

    @property
    def arguments(self) -> list[str]:
        given = [str(self.source), "--budget", str(self.budget)]
        if self.tokens is not None:
            given += ["--calibration", str(self.tokens), "--batch-size", str(BATCH)]
        return given


def run(job: Job, out: Path, kill_after: int | None = None, *, stream: bool = True) -> Run:
    """Compress in a process of its own; kill it some time after so many weights are finished."""
    arguments = ["compile", *job.arguments, "--out", str(out), *["--stream"] * stream]
    log = out.parent / f"{out.name}.log"
    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorize.cli", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        if kill_after is not None:
            while len(list(out.glob(".tensorize-stream/analysis-*/*.safetensors"))) < kill_after:
                if process.poll() is not None:
                    break
                time.sleep(0.05)
            time.sleep(random.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    said = tuple(log.read_text().splitlines())
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(process.returncode, peak, seconds, usage.ru_utime + usage.ru_stime, said)


def killed_once(job: Job, out: Path, weights: int) -> dict[str, Any]:
    """A run that is killed at a random moment, and the one that goes on."""
    after = random.randrange(1, weights)
    first = run(job, out, after)
    assert first.code == -signal.SIGKILL, first.said
    kept = len(list(out.glob(".tensorize-stream/analysis-*/*.safetensors")))
    second = run(job, out)
    assert second.code == 0, second.said
    return {
        "killed_after_files": kept,
        "peak_bytes": [first.peak_bytes, second.peak_bytes],
        "seconds": [first.seconds, second.seconds],
        "processor_seconds": [first.processor_seconds, second.processor_seconds],
        "said": second.said[-6:],
    }


def weights_file(out: Path) -> bytes:
    (file,) = out.glob("tensorize-*.safetensors")
    return file.read_bytes()


def small(place: Path, budget: float, metric: str) -> dict[str, Any]:
    """Killed and not killed, and in memory where data count: the same bytes."""
    count = make(place / "dense", SMALL)
    job = job_of(place, SMALL, "small", budget, metric)
    whole = run(job, place / "whole", stream=metric == "frobenius")
    assert whole.code == 0, whole.said
    broken = killed_once(job, place / "broken", 25)
    same = weights_file(place / "whole") == weights_file(place / "broken")
    return {"parameters": count, "same_bytes": same, **broken}


def large(place: Path, budget: float, metric: str) -> dict[str, Any]:
    """What 1.5 B parameters take."""
    count = make(place / "dense", LARGE)
    job = job_of(place, LARGE, "large", budget, metric)
    result = {"parameters": count, **killed_once(job, place / "out", 150)}
    both = sum(result["processor_seconds"])
    result["microseconds_a_parameter"] = 1e6 * both / count
    result["most_bytes"] = MOST_MEMORY[metric]
    result["under_most_bytes"] = max(result["peak_bytes"]) < MOST_MEMORY[metric]
    return result


def job_of(place: Path, sizes: dict[str, Any], size: str, budget: float, metric: str) -> Job:
    """The checkpoint that was made in a place, with data where the metric needs some."""
    tokens = None
    if metric == "loss":
        tokens = write_tokens(place / "tokens.safetensors", sizes, TOKENS[size])
    return Job(place / "dense", budget, tokens)


def main() -> None:
    """Run both sizes, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--metric", choices=list(MOST_MEMORY), default="frobenius")
    parser.add_argument("--only-small", action="store_true", help="keep nothing")
    options = parser.parse_args()
    kept_as = "stream" if options.metric == "frobenius" else f"stream_{options.metric}"
    results: dict[str, Any] = {"budget": options.budget, "metric": options.metric}
    sizes = {"small": small} if options.only_small else {"small": small, "large": large}
    for name, measure in sizes.items():
        place = Path(tempfile.mkdtemp(prefix=f"tensorize-{name}-"))
        try:
            results[name] = measure(place, options.budget, options.metric)
        finally:
            shutil.rmtree(place)
        print(json.dumps(results[name], indent=1), flush=True)
    if not options.only_small:
        print(f"kept in {keep(kept_as, results)}")


if __name__ == "__main__":
    main()
