"""A training step of trains, blocks and low rank: time, and what a forward pass leaves alive.

    python -m benchmarks.train_formats --threads 1

Forward, backward and fused AdamW of two layers of a Llama (2 x 256 tokens) and of the small GPT of
``examples`` (4 x 256), whose linears keep a quarter: as they are (``autograd``, twice, to show the
noise), and ``limited`` to what has to be saved (``limit_saved(model, 0)``). Interleaved rounds,
medians, the processor's time.

The results also hold ``search`` and ``search, limited``: orders for both passes and what to save,
searched together for the fewest FLOPs. At commit 7d95acc they were measured in the same rounds,
beside ``autograd`` and ``limited``, and did not win; so there is no such search any more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.model import llama, ranks
from benchmarks.record import keep, kept, processor
from benchmarks.timing import interleaved
from examples.gpt import GPT
from tensorize.ir.spec import TTSpec
from tensorize.training.groups import parameter_groups
from tensorize.training.memory import LiveBytes
from tensorize.weight.whole_model import limit_saved

FORMATS = ("tt", "three cores", "block", "low_rank")
SHARE, LAYERS = 0.25, 2


def split(size: int) -> tuple[int, int, int]:
    """Three factors that are close to each other."""
    ways = [
        (a, b, size // (a * b))
        for a in range(1, size + 1)
        if size % a == 0
        for b in range(a, size // a + 1)
        if size // a % b == 0 and size // (a * b) >= b
    ]
    return min(ways, key=sum)


def three_cores(m: int, n: int) -> TTSpec:
    """A train of three cores with a quarter of the elements, or as many as its ranks can take."""
    rows, columns = split(m), split(n)
    rank, spec = 1, TTSpec(rows, columns, (1, 1))
    while True:
        rank += 1
        most = rows[0] * columns[0], rows[2] * columns[2]
        trial = TTSpec(rows, columns, (min(rank, most[0]), min(rank, most[1])))
        if trial == spec or trial.parameters > SHARE * m * n:
            return spec
        spec = trial


def small(dense: nn.Module, how: str) -> nn.Module:
    if how == "low_rank":
        return tensorize.initialize(dense, None, ranks=dict(ranks(dense)))
    if how == "three cores":
        specs = {
            f"{path}.weight": three_cores(*module.weight.shape)
            for path, module in dense.named_modules()
            if isinstance(module, nn.Linear)
        }
        total = sum(p.numel() for p in dense.parameters())
        least = total - sum(math.prod(spec.shape) - spec.parameters for spec in specs.values())
        budget = tensorize.Budget(params=least)  # so that each of them is taken
        return tensorize.initialize(dense, budget, formats=specs, include=list(specs))
    return tensorize.initialize(dense, SHARE, formats=how)


def step(
    loss_of: Callable[[nn.Module], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(loss_of: Callable[[nn.Module], Tensor], model: nn.Module) -> float:
    """Megabytes that a forward pass leaves alive."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        loss = loss_of(model)
    size = live.bytes / 1e6
    del loss
    return size


def of_llama() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    ids = torch.randint(32_000, (2, 256), generator=torch.Generator().manual_seed(0))
    model = llama().train()
    del model.model.layers[LAYERS:]
    return model, lambda model: model(ids, labels=ids, use_cache=False).loss


def of_gpt() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = GPT()
    ids = torch.randint(
        model.config.vocabulary, (4, 256), generator=torch.Generator().manual_seed(0)
    )

    def loss_of(model: nn.Module) -> Tensor:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return model.train(), loss_of


MODELS = {"llama": of_llama, "gpt": of_gpt}


def measure(name: str, how: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dense, loss_of = MODELS[name]()
    free, limited = small(dense, how), small(dense, how)
    limit_saved(limited, 0)
    calls: dict[str, Callable[[], None]] = {}
    for model, keys in ((free, ("autograd", "autograd again")), (limited, ("limited",))):
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.1), fused=True)
        calls |= {key: partial(step, loss_of, model, optimizer) for key in keys}
    times = interleaved(calls, rounds)
    sizes = {"autograd": saved(loss_of, free), "limited": saved(loss_of, limited)}
    return {
        "parameters": sum(p.numel() for p in free.parameters()),
        "autograd ms": 1e3 * times["autograd"].cpu,
        "time over autograd": {k: t.over(times["autograd"]) for k, t in times.items()},
        "saved MB": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, key = kept("train_formats"), f"{processor()}, {options.threads} threads"
    for name in options.models:
        for how in options.formats:
            found = measure(name, how, options.rounds)
            known = results.setdefault(key, {}).setdefault(f"{name}, {how}", {})
            known |= found  # what was measured of the search stays
            keep("train_formats", results)
            print(name, how, found, flush=True)


if __name__ == "__main__":
    main()
