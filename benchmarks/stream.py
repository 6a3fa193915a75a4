"""A checkpoint of 1.5 B parameters, compressed by the command line under 4 GB, killed once.

    python -m benchmarks.stream

Makes random Llama-shaped checkpoints in bfloat16, shard by shard, and compresses them with
`tensorize compile --stream` in a process of its own, whose largest resident memory the system
counts. The large one is killed at a random moment and goes on. A small one is compressed twice,
once killed and once not, and the two results are compared byte by byte. Weights get a spectrum as
trained ones have: random ones of full rank would be the same work.
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
MOST_MEMORY = 4e9
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


# -------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """One process: how it ended, what it held and took, and the last that it said."""

    code: int
    peak_bytes: int
    seconds: float
    processor_seconds: float
    said: tuple[str, ...]


def run(source: Path, out: Path, budget: float, kill_after: int | None = None) -> Run:
    """Compress in a process of its own; kill it some time after so many weights are finished."""
    arguments = ["compile", str(source), "--stream", "--budget", str(budget), "--out", str(out)]
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
            while len(list(out.glob(".tensorize-stream/*/*.safetensors"))) < kill_after:
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


def killed_once(source: Path, out: Path, budget: float, weights: int) -> dict[str, Any]:
    """A run that is killed at a random moment, and the one that goes on."""
    after = random.randrange(1, weights)
    first = run(source, out, budget, after)
    assert first.code == -signal.SIGKILL, first.said
    kept = len(list(out.glob(".tensorize-stream/*/*.safetensors")))
    second = run(source, out, budget)
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


def small(place: Path, budget: float) -> dict[str, Any]:
    """Killed and not killed: the same bytes."""
    count = make(place / "dense", SMALL)
    whole = run(place / "dense", place / "whole", budget)
    assert whole.code == 0, whole.said
    broken = killed_once(place / "dense", place / "broken", budget, 25)
    same = weights_file(place / "whole") == weights_file(place / "broken")
    return {"parameters": count, "same_bytes": same, **broken}


def large(place: Path, budget: float) -> dict[str, Any]:
    """What 1.5 B parameters take."""
    count = make(place / "dense", LARGE)
    result = {"parameters": count, **killed_once(place / "dense", place / "out", budget, 150)}
    both = sum(result["processor_seconds"])
    result["microseconds_a_parameter"] = 1e6 * both / count
    result["under_4_gb"] = max(result["peak_bytes"]) < MOST_MEMORY
    return result


def main() -> None:
    """Run both sizes, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--only-small", action="store_true", help="keep nothing")
    options = parser.parse_args()
    results: dict[str, Any] = {"budget": options.budget}
    sizes = {"small": small} if options.only_small else {"small": small, "large": large}
    for name, measure in sizes.items():
        place = Path(tempfile.mkdtemp(prefix=f"tensorize-{name}-"))
        try:
            results[name] = measure(place, options.budget)
        finally:
            shutil.rmtree(place)
        print(json.dumps(results[name], indent=1), flush=True)
    if not options.only_small:
        print(f"kept in {keep('stream', results)}")


if __name__ == "__main__":
    main()
