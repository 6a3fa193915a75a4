"""What an analysis layer by layer will take, said beforehand."""

from __future__ import annotations

from tensorize.base import printer
from tensorize.passes.layers.layers import Layers
from tensorize.passes.observe.moments import has_moments, moment_bytes
from tensorize.passes.observe.parts import entries_of
from tensorize.passes.stages import Found


def cost_in_layers(layers: Layers, found: Found) -> str:
    """Memory for the largest part, and disk: activations, gradients, and what curves hold."""
    chain, batches = layers.chain, layers.batches
    weights: dict[int | None, int] = {}
    for name, (_, size) in found.sizes.items():
        part = chain.part_of(name)
        weights[part] = weights.get(part, 0) + size
    moments: dict[int | None, list[int]] = {part: [] for part in weights}
    for site in found.free:
        if has_moments(site, found.metric):
            moments[chain.part_of(site.name)].append(moment_bytes(site, found.metric))
    # While a batch is added there is what it adds, which is whole.
    memory = max(
        size + sum(moments[part]) + 2 * max(moments[part], default=0)
        for part, size in weights.items()
    )
    share = sum(map(entries_of, batches)) / max(entries_of(batches[0]), 1)
    disk = (chain.passed * share) * (layers.count + 3) + sum(map(sum, moments.values()))
    return (
        f"layer by layer: {layers.count} layers, {printer.bytes_(memory)} of memory for the "
        f"weights and second moments of one, beside one batch; {printer.bytes_(int(disk))} of disk "
        f"in {layers.work.folder}"
    )
