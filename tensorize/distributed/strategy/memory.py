"""What a device holds in a training step, by cause.

Mixed precision takes 20 bytes a parameter (Dash et al. 2023, "Optimizing distributed training on
Frontier"): 2 of the copy that is computed with and 4 of the master, 4 of the gradient and 2 of that
of the copy, 8 of Adam's two states. The parameters of a compressed model are its factors, so their
states shrink as they do.
"""

from __future__ import annotations

import numpy as np

from tensorize.distributed.strategy.over_layers import OverLayers
from tensorize.distributed.strategy.strategy import BTP, INPUTS, KEEP, NAIVE, Strategy
from tensorize.distributed.strategy.workload import Layer, Workload
from tensorize.training.memory import PRECISIONS, STATES

WEIGHTS, GRADIENTS, _STATE, COPIES = PRECISIONS["mixed"]
HALF = 2
MASTERS = WEIGHTS - HALF
"""Bytes of the master of a parameter, beside the copy in half precision."""
OPTIMIZER = _STATE * STATES["adamw"]
HOSTED = MASTERS + OPTIMIZER
"""Bytes of a parameter that go to the host with the optimizer's states."""
_LOSS = 6
"""Bytes of a logit: in half precision, and its gradient in float32."""


def saved_elements(layer: Layer, style: str, tp: int) -> float:
    """Elements a row that a layer keeps for its backward pass where nothing is computed again.

    The residual stream before each norm, the inputs of every group, the outputs of those that do
    not close, and the first products. Where a style leaves a tensor whole, every device has it.
    """
    stream = 1.0 / tp if style == BTP else 1.0
    found = layer.width * layer.norms * stream
    for group in layer.groups:
        # Closing groups read what their own device made.
        found += group.inputs * (1.0 / tp if group.closes else stream)
        if not group.closes:
            whole = sum(linear.outputs for linear in group.low_rank)
            found += whole / (1 if style == NAIVE else tp)
            found += sum(linear.outputs for linear in group.dense) / tp
        found += group.ranks / (1 if style == BTP else tp)
    return found


def kept_elements(layer: Layer, style: str, tp: int, checkpoint: str) -> float:
    """The same where ``checkpoint`` says what is computed again."""
    if checkpoint == KEEP:
        return saved_elements(layer, style, tp)
    stream = layer.width / (tp if style == BTP else 1)
    if checkpoint == INPUTS:
        return stream
    ranks = sum(group.ranks for group in layer.groups)
    return stream + ranks / (1 if style == BTP else tp)


def memory_of(
    over: OverLayers, strategy: Strategy, sequence: int, itemsize: int
) -> dict[str, float]:
    """Bytes by cause on the device that holds most; ``itemsize`` of what is computed with."""
    workload, style, tp, dp = over.workload, strategy.style, strategy.tp, strategy.dp
    stages, how = strategy.pp, (style, tp, strategy.checkpoint)
    factors = over.stages(stages, "factors", lambda layer: layer.compressed) / tp
    others = over.stages(stages, "others", lambda layer: layer.parameters - layer.compressed) / tp
    ends = workload.ends / tp / min(stages, 2)
    others[0] += ends
    if stages > 1:
        others[-1] += ends
    count, rows = factors + others, strategy.rows * sequence
    kept = over.stages(stages, ("kept", *how), lambda layer: kept_elements(layer, *how))
    # A stage has begun with as many micro-batches as there are stages from it on (1F1B).
    live = np.minimum(np.arange(stages, 0, -1), strategy.micro)
    again = 0.0
    if strategy.checkpoint != KEEP:
        again = over.largest(("saved", style, tp), lambda layer: saved_elements(layer, style, tp))
    sharded = dp if strategy.sharded else 1
    states, masters = (0.0, 0.0) if strategy.offload else (OPTIMIZER / dp, MASTERS / dp)
    found = {
        "weights": count * (HALF / sharded + masters),
        "gradients": count * (GRADIENTS + COPIES) / sharded,
        "states of factors": factors * states,
        "states of others": others * states,
        "activations": itemsize * rows * (kept * live + again),
        "logits": np.append(np.zeros(stages - 1), _LOSS * rows * workload.head.outputs / tp),
    }
    if strategy.sharded:  # whole layers: the one that runs, and the next one
        layer = over.largest("parameters", lambda layer: layer.parameters)
        found["gathered"] = np.full(stages, 2 * HALF * layer / tp)
    worst = int(np.argmax(sum(found.values())))
    return {cause: float(size[worst]) for cause, size in found.items() if size[worst]}


def states_table(workload: Workload) -> dict[str, float]:
    """Bytes of a model's states over all devices, as the rule counts them."""
    count = workload.parameters
    return {
        "weights": WEIGHTS * count,
        "gradients": GRADIENTS * count,
        "states": OPTIMIZER * count,
        "copies": COPIES * count,
    }


def host_bytes(workload: Workload, strategy: Strategy) -> float:
    """What one device's share of the host holds, where states are there."""
    count = workload.parameters / (strategy.tp * strategy.pp * strategy.dp)
    return count * HOSTED if strategy.offload else 0.0
