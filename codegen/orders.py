"""Contraction orders timed on this machine, and kept: what ``autotune=True`` finds.

Predicted times are good enough to leave out the bad orders, not to tell the best few apart. So
those are run, on random numbers, and the fastest is remembered beside the machine's own figures, by
what was asked: the spec, its side, the range of batches.
"""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tensorize.codegen import aten, machine
from tensorize.ir import ContractionPlan, Tree

_ROUNDS = 7


def place(device: str = "cpu") -> Path:
    """Where the orders of this machine are kept."""
    figures = machine.place(device)
    return figures.with_name(figures.name.replace("machine-", "orders-"))


def known(device: str = "cpu") -> dict[str, Tree]:
    """The fastest orders found so far, by what was asked."""
    try:
        found: dict[str, str] = json.loads(place(device).read_text())
        return {key: ast.literal_eval(text) for key, text in found.items()}
    except (OSError, ValueError, SyntaxError, AttributeError):  # none, or of something else
        return {}


def remember(found: Mapping[str, Tree], device: str = "cpu") -> Path:
    """Adds orders to those that are kept."""
    path = place(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    everything = {**known(device), **found}
    draft.write_text(json.dumps({key: str(tree) for key, tree in everything.items()}, indent=1))
    os.replace(draft, path)
    return path


@torch.no_grad()
def fastest(
    plans: Sequence[ContractionPlan], batch: int, dtype: torch.dtype, device: str = "cpu"
) -> int:
    """Which of several plans of one spec takes the least time for a batch."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    spec = plans[0].spec
    cores = [draw(*shape) for shape in spec.core_shapes]
    width = spec.shape[-1] if plans[0].contract == "columns" else spec.shape[-2]
    x = draw(*spec.shape[:-2], batch, width)
    calls = [aten.build(plan) for plan in plans]
    # In turn, and of each its best: what else the machine does meanwhile decides nothing.
    least = [math.inf] * len(calls)
    for _ in range(_ROUNDS):
        for k, call in enumerate(calls):
            took = machine.seconds_of(lambda call=call: call(x, cores), device, rounds=1)
            least[k] = min(least[k], took)
    return least.index(min(least))
