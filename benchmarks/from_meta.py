"""A 7 B-shaped Llama on the meta device becomes a compressed one: how much memory that takes.

    python -m benchmarks.from_meta

The model's own size is what its parameters take in the end. Its dense weights exist one module's at
a time, so the peak of resident memory is that size, the largest dense weights of one module, and
what the libraries take by themselves (measured before).
"""

from __future__ import annotations

import resource
import time

import torch
import transformers

import tensorize
from benchmarks.record import keep

BUDGET = 0.1


def peak() -> float:
    """Megabytes that this process took at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    config = transformers.LlamaConfig()  # the defaults are those of the 7 B model
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    dense = sum(p.numel() for p in model.parameters())
    module = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    layer = max(
        sum(p.nbytes for child in m.children() for p in child.parameters(recurse=False))
        for m in model.modules()
        if not isinstance(m, torch.nn.ModuleList)
    )
    tensorize.initialize(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.5)  # what it imports
    before, began = peak(), time.monotonic()
    small = tensorize.initialize(model, BUDGET, progress=True)
    own = sum(p.nbytes for p in small.parameters())
    found = {
        "dense parameters": dense,
        "parameters": sum(p.numel() for p in small.parameters()),
        "own MB": own / 1e6,
        "largest module's dense MB": max(module, layer) / 1e6,
        "libraries MB": before,
        "peak MB": peak(),
        "seconds": time.monotonic() - began,
    }
    for name, value in found.items():
        print(f"{name}: {value:,.0f}")
    print(f"kept in {keep('from_meta', found)}")


if __name__ == "__main__":
    main()
