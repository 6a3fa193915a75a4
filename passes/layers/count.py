"""Which rows of every matmul count, of batches where not all do, learned layer by layer.

As in ``passes/observe/counted.py`` dependence is followed backwards, from the outputs' rows that
count; what it comes to at every layer is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.ir.sites import Batch
from tensorize.passes.layers.chain import Back, Part
from tensorize.passes.layers.gradients import drop_all, has_all, keep_gradient, towards
from tensorize.passes.layers.layers import Layers, Place, used_in, wanted_in
from tensorize.passes.observe.counted import Counted, reached_rows, reading
from tensorize.passes.observe.hidden import hides_rows
from tensorize.passes.observe.loss import LossOption, function_of
from tensorize.passes.observe.outputs import call, outputs_of
from tensorize.passes.stages import Found

_MASKED = "masked"


@dataclass(frozen=True)
class CountInLayers:
    """Finds the rows that count, of those of the layers' batches where not all do."""

    layers: Layers
    loss_fn: LossOption = None
    name: str = "rows"

    def run(self, found: Found) -> Found:
        layers, work = self.layers, self.layers.work
        layers.run(found.progress)
        if (known := work.noted(_MASKED)) is None:
            with layers.outer() as (_, back):
                known = {"batches": self._masked(back)}
            work.note(_MASKED, known)
        masked = known["batches"]
        if masked and not has_all(work, [_masks("front", j) for j in masked]):
            self._run(found, masked)
        return replace(found, summary=f"not all count in {len(masked)} batches")

    def _masked(self, back: Back) -> list[int]:
        """The batches where not all rows count, or may not."""
        layers, batches, model = self.layers, self.layers.batches, self.layers.chain.model
        with torch.no_grad():
            outputs = outputs_of(call(back, layers.outputs_from(0)), batches[0], model)
        least = min(len(output.rows) for output in outputs)
        everywhere = function_of(self.loss_fn) is not None or layers.chain.most_rows > least
        return [j for j, batch in enumerate(batches) if everywhere or hides_rows(batch, model)]

    def _run(self, found: Found, masked: list[int]) -> None:
        layers, work = self.layers, self.layers.work
        count, total = layers.count, (layers.count + 2) * len(masked)

        def names(k: int) -> list[str]:
            return [_counting(k, j) for j in masked]

        def learn(
            part: nn.Module,
            place: Place,
            inputs: Callable[[int], Batch],
            probe: Callable[[int], Callable[[Any], Tensor]],
            begun: int,
        ) -> None:
            sites = {site.name: site for site in found.free}
            wanted = wanted_in(layers.chain, place if isinstance(place, int) else None, sites)
            if place == "front":
                wanted = used_in(part, inputs(masked[0]), wanted)
            for done, j in enumerate(masked):
                found.progress("rows", begun * len(masked) + done, total)
                some: Counted = {}
                if wanted or isinstance(part, Part):
                    some = reached_rows(part, inputs(j), wanted, sites, probe(j))
                work.put(
                    _masks(place, j),
                    **{f"{n}.{name}": m for name, calls in some.items() for n, m in calls.items()},
                )
                if isinstance(part, Part):
                    k = place if isinstance(place, int) else count
                    keep_gradient(work, _counting(k, j), part)

        reached = next((k for k in range(count + 1) if has_all(work, names(k))), None)
        if reached is None:
            with layers.outer() as (_, back):
                model, loss_fn = layers.chain.model, function_of(self.loss_fn)
                learn(
                    back,
                    "back",
                    layers.outputs_from,
                    lambda j: reading(model, layers.batches[j], loss_fn),
                    0,
                )
        for k in reversed(range(count if reached is None else reached)):
            with layers.block(k) as block:
                learn(
                    block,
                    k,
                    lambda j, k=k: layers.inputs(k, j),
                    lambda j, k=k: towards(work, _counting(k + 1, j)),
                    count - k,
                )
            drop_all(work, names(k + 1))
        with layers.outer() as (front, _):
            learn(
                front,
                "front",
                layers.arguments,
                lambda j: towards(work, _counting(0, j)),
                count + 1,
            )
        drop_all(work, names(0))
        found.progress("rows", total, total)


def masks_of(layers: Layers, place: Place, j: int) -> Counted:
    """The rows of a part that count, of one batch; of what is not there all do."""
    if not layers.work.has(_masks(place, j)):
        return {}
    found: dict[str, dict[int, Tensor]] = {}
    for key, mask in layers.work.get(_masks(place, j)).items():
        number, _, name = key.partition(".")
        found.setdefault(name, {})[int(number)] = mask
    return found


def both(one: Counted, other: Counted) -> Mapping[str, Mapping[int, Tensor]]:
    """Masks of different calls together."""
    return {n: {**one.get(n, {}), **other.get(n, {})} for n in {**one, **other}}


def _counting(k: int, j: int) -> str:
    return f"counting-{k:04}-{j:05}"


def _masks(place: Place, j: int) -> str:
    return f"masks-{place}-{j:05}"
