"""Steps of two or four processes beside what the planner says of them.

    python -m benchmarks.strategy_steps --processes 2

The group is measured first (as ``tensorize calibrate --distributed`` does), then five models that
nothing was fitted to take steps (forward, backward, AdamW in one pass) in each style, on the CPU by
gloo.
Medians of the slowest process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch.distributed.device_mesh import init_device_mesh

import tensorize
from benchmarks.record import keep
from tensorize.base.records import plain
from tensorize.distributed import Strategy, plan
from tensorize.distributed.strategy.measure import measure

# Width, inner size, layers, heads, rank, sequences, tokens of each.
SHAPES = {
    "narrow": (256, 704, 4, 8, 64, 4, 128),
    "wide": (768, 2048, 2, 12, 192, 2, 256),
    "low": (512, 1408, 4, 8, 64, 4, 256),
    "high": (512, 1408, 4, 8, 192, 4, 128),
    "long": (384, 1056, 3, 8, 96, 1, 1024),
}
WORDS, ROUNDS = 512, 9


def model_of(shape: tuple[int, ...], rank: int | None) -> Any:
    width, inner, layers, heads, *_ = shape
    config = hf.LlamaConfig(
        **{"vocab_size": WORDS, "hidden_size": width, "intermediate_size": inner},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": heads, "tie_word_embeddings": False},
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    if rank is None:
        return model
    return tensorize.initialize(model, None, ranks={"*layers*": rank})


def took(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a step: the median, of the slowest process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    found = []
    for _ in range(ROUNDS + 2):
        dist.barrier()
        began = time.perf_counter()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(float(seconds))
    return statistics.median(found[2:])


def compare(rank: int, count: int, meeting: str, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("tp",))
    cluster, rows = measure(), []
    for name, shape in SHAPES.items():
        for style in ("btp", "naive", "megatron"):
            model = model_of(shape, None if style == "megatron" else shape[4])
            sequences, tokens = shape[5:]
            options = {"devices": count, "batch": sequences, "sequence": tokens}
            found = plan(model, machine=cluster, **options)
            told = found.explain(Strategy(tp=count, style=style, rows=sequences))
            tensorize.distributed.parallelize(model, mesh, style=style)
            seconds = took(model, torch.randint(WORDS, (sequences, tokens)))
            off = told.total / seconds - 1
            rows.append(
                {"shape": name, "style": style, "measured": seconds, "predicted": told.total}
                | {"off": off, "causes": told.seconds}
            )
            if rank == 0:
                print(f"{name:8}{style:10}{seconds:8.3f} s {told.total:8.3f} told {off:+7.1%}")
    if rank == 0:
        Path(place).write_text(json.dumps({"cluster": plain(cluster), "rows": rows}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    count = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        meeting, place = (Path(folder) / "meeting").as_uri(), str(Path(folder) / "result")
        torch.multiprocessing.spawn(compare, (count, meeting, place), nprocs=count)
        found = json.loads(Path(place).read_text())
    worst = max(abs(row["off"]) for row in found["rows"])
    print(f"farthest off: {worst:.1%}")
    keep(f"strategy_steps_{count}", found)


if __name__ == "__main__":
    main()
