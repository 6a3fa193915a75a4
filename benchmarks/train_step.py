"""A training step of a Llama at a quarter of the parameters of every linear, side by side.

    python -m benchmarks.train_step --threads 1

Forward, backward and fused AdamW for 2 x 256 tokens: dense, two matmuls for each linear written by
hand (of the rank that a quarter comes to), and ours, eager and under ``torch.compile`` (ours with
``backend="tensorize"``, the others with inductor), interleaved in one run, medians. Also what each
holds: weights, gradients, states of the optimizer, and what the forward pass saves (with low-rank
checkpointing as well), beside what ``tensorize.training.memory`` predicted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.model import ByHand, llama, ranks
from benchmarks.record import keep
from benchmarks.timing import interleaved
from tensorize.evaluation.energy import joules_of
from tensorize.training import memory
from tensorize.training.checkpointing import checkpoint_low_rank
from tensorize.training.groups import parameter_groups
from tensorize.training.memory import LiveBytes
from tensorize.weight.low_rank import LowRankLinear

BATCH, TOKENS, RATE = 2, 256, 1e-4


def by_hand(dense: nn.Module, small: nn.Module) -> nn.Module:
    """The factors of a compressed model as plain modules."""
    model = copy.deepcopy(dense)
    for path, layer in small.named_modules():
        if isinstance(layer, LowRankLinear):
            parent, _, leaf = path.rpartition(".")
            first, second = layer.first.weight.detach(), layer.second.weight.detach()
            own = ByHand(first.clone(), second.clone(), None)
            setattr(model.get_submodule(parent), leaf, own)
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def held(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, float]:
    """Megabytes of weights, gradients, states, and of what a forward pass leaves alive."""
    own = [*model.parameters(), *model.buffers()]
    with LiveBytes(own) as live:
        loss = model(ids, labels=ids, use_cache=False).loss
    saved = live.bytes
    loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    states = sum(
        v.nbytes
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor) and v.dim() > 0
    )
    weights = sum(p.nbytes for p in model.parameters())
    found = {"weights": weights, "gradients": gradients, "optimizer": states, "activations": saved}
    return {name: size / 1e6 for name, size in found.items()}


def measure(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = llama().train()
    exact = ranks(dense)
    # As initialize does it where it has the choice: ranks are multiples of 8.
    small = tensorize.initialize(dense, None, ranks={k: r - r % 8 for k, r in exact.items()})
    models: dict[str, nn.Module] = {
        "dense": dense,
        "by hand": by_hand(dense, tensorize.initialize(dense, None, ranks=dict(exact))),
        "tensorize": small,
    }
    ids = torch.randint(32_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, Any] = {}
    optimizers = {}
    for name, model in models.items():
        groups = parameter_groups(model, RATE, 0.1)
        optimizers[name] = torch.optim.AdamW(groups, fused=True)
        calls[name] = partial(step, model, optimizers[name], ids)
        # Compiled, it is the same model with the same optimizer.
        backend = "tensorize" if name == "tensorize" else "inductor"
        compiled = torch.compile(model, backend=backend)
        calls[f"{name}, compiled"] = partial(step, compiled, optimizers[name], ids)
    times = interleaved(calls, rounds)
    energy = {name: joules_of(each, "cpu") for name, each in calls.items()}
    for name, model in models.items():
        sizes[name] = held(model, optimizers[name], ids)
        predicted = memory(model, precision="float32", batch={"input_ids": ids, "labels": ids})
        sizes[name]["predicted activations"] = predicted.activations / 1e6
    checkpoint_low_rank(small)
    checkpointed = held(small, optimizers["tensorize"], ids)["activations"]
    sizes["tensorize"]["activations, checkpointed"] = checkpointed
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {
        "dense ms": 1e3 * times["dense"].wall,
        **{name: times["dense"].over(times[name]) for name in calls if name != "dense"},
        "tensorize over by hand": times["by hand"].over(times["tensorize"]),
        "parameters": count,
        "MB": sizes,
        "joules a step": energy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.rounds)
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"kept in {keep('train_step', found)}")


if __name__ == "__main__":
    main()
