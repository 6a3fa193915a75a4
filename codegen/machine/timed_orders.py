"""Contraction orders timed on this machine, and kept: what ``autotune=True`` finds.

Predicted times are good enough to leave out the bad orders, not to tell the best few apart. So
those are run, on random numbers, each in a few layouts, and the fastest is remembered beside the
machine's own figures, by what was asked: the spec, its side, the range of batches.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tensorize.base import files, timer
from tensorize.codegen.aten import emit as aten
from tensorize.codegen.machine import rates
from tensorize.ir.orders import ContractionPlan, Tree
from tensorize.version import __version__
from tensorize.weight import products

_LAYOUTS = 6
"""Layouts of each order that are timed."""
_LOOKS = 2
"""Times that each is looked at."""
_KEPT, _ROUNDS = 4, 7
"""The fastest of all go on, for so many rounds."""
_TIE = 1.03
"""What is slower by less than this is as fast: then the prediction decides."""


def place(device: str = "cpu") -> Path:
    """Where the orders of this machine are kept: layouts are numbers, which a version counts."""
    figures = rates.place(device)
    name = figures.name.replace("machine-", f"contractions-{__version__}-")
    return figures.with_name(name)


def known(device: str = "cpu") -> dict[str, tuple[Tree, int]]:
    """The fastest orders found so far, and their layouts, by what was asked."""
    return _parsed(files.read_records(place(device)))


def _parsed(records: Mapping[str, str]) -> dict[str, tuple[Tree, int]]:
    try:
        return {key: ast.literal_eval(text) for key, text in records.items()}
    except (ValueError, SyntaxError):  # records of something else
        return {}


def remember(found: Mapping[str, tuple[Tree, int]], device: str = "cpu") -> Path:
    """Adds orders and their layouts to those that are kept."""
    path = place(device)

    def added(records: dict[str, str]) -> dict[str, str]:
        return {key: str(chosen) for key, chosen in {**_parsed(records), **found}.items()}

    files.update_records(path, added)
    return path


@torch.no_grad()
def fastest(
    plans: Sequence[ContractionPlan],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
) -> ContractionPlan:
    """Which of several plans of one spec, of one piece each, takes the least time for some batches.

    Each is tried in its layouts of least predicted time; of several batches the geometric mean
    counts.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    spec = plans[0].spec
    cores = [draw(*shape) for shape in spec.core_shapes]
    width = spec.shape[-1] if plans[0].contract == "columns" else spec.shape[-2]
    inputs = [draw(*spec.shape[:-2], batch, width) for batch in batches]
    tried = [layout for plan in plans for layout in aten.layouts(plan, _LAYOUTS)]

    def seconds(plan: ContractionPlan) -> list[float]:
        call = {plan.contract: aten.build(plan)}
        runs = (partial(products.matmul, spec, call, cores, x, plan.contract) for x in inputs)
        return [timer.seconds_of(run, device, rounds=1) for run in runs]

    def over_batches(plan: ContractionPlan, typical: Callable[[Sequence[float]], float]) -> float:
        return statistics.geometric_mean(map(typical, zip(*samples[plan], strict=True)))

    # In turn: what else the machine does meanwhile slows all of them. The first ones pay for memory
    # that those after them find, so that none is left out by what it took at first.
    samples: dict[ContractionPlan, list[list[float]]] = {plan: [] for plan in tried}
    for _ in range(_LOOKS):
        for plan in tried:
            samples[plan].append(seconds(plan))
    best = sorted(tried, key=lambda plan: over_batches(plan, min))[:_KEPT]
    for _ in range(_ROUNDS):
        for plan in best:
            samples[plan].append(seconds(plan))
    typical = {plan: over_batches(plan, statistics.median) for plan in tried if plan in best}
    least = min(typical.values())
    return next(plan for plan, took in typical.items() if took <= _TIE * least)
