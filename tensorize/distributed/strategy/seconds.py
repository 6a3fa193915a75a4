"""What a layer takes on one device of a tensor-parallel group: products, passes, messages."""

from __future__ import annotations

from tensorize.distributed.strategy.cluster import Cluster
from tensorize.distributed.strategy.memory import saved_elements
from tensorize.distributed.strategy.strategy import BTP, NAIVE
from tensorize.distributed.strategy.volumes import Message, forward_messages
from tensorize.distributed.strategy.workload import Group, Layer, Linear

_HEAD = 128
"""Kernels of attention fill smaller heads up to this width."""
AROUND = 4
"""What a layer of transformers starts beside operations: hooks, caches, masks."""
BACK = 1.5
"""What a layer's backward pass starts, over what its forward pass does."""
_LOSSES = 3
"""Tensors of the size of the logits that an eager loss makes."""
ENDS = 10
"""What the embedding, the head and the loss start, in products."""


def first_seconds(cluster: Cluster, layer: Layer, style: str, tp: int, rows: int) -> float:
    """Seconds of a forward pass's products with first factors."""
    total = 0.0
    for group in layer.groups:
        if style == BTP and group.firsts:  # of one input they are one product
            read = sum(lin.read * (lin.rank or 0) for lin in group.firsts) / group.ranks
            total += cluster.product_seconds(rows, read / tp, group.ranks)
            continue
        split = tp if style == NAIVE else 1
        for linear in group.firsts:
            total += cluster.product_seconds(rows, linear.read, (linear.rank or 0) / split)
    return total


def other_seconds(
    cluster: Cluster, layer: Layer, style: str, tp: int, rows: int, sequence: int
) -> float:
    """Seconds of everything else that it computes: second and dense products, attention, passes."""
    total = sum(_second_seconds(cluster, group, style, tp, rows) for group in layer.groups)
    if layer.heads:
        # Causal: half of all pairs, once for the scores and once for the values.
        flops = 2 * 2 * rows * (sequence / 2) * layer.attention / tp
        each = max(layer.attention // layer.heads, _HEAD)
        total += flops / (cluster.peak * cluster.share(each) * cluster.attention)
    # What is saved for the backward pass was written once and read once, or ``eager`` times.
    return total + cluster.eager * cluster.pass_seconds(
        2 * cluster.itemsize * rows * saved_elements(layer, style, tp)
    )


def starts(layer: Layer, style: str, tp: int) -> int:
    """What a layer's forward pass starts, in products: one a factor, three a collective, four for
    norms, attention and what stands between, and what a model does around them."""
    messages = len(forward_messages(layer, style)) if tp > 1 else 0
    return 4 + AROUND + matrices(layer) + 3 * messages


def matrices(layer: Layer) -> int:
    """The factors and dense weights of a layer."""
    return sum(2 * len(group.low_rank) + len(group.dense) for group in layer.groups)


def _second_seconds(cluster: Cluster, group: Group, style: str, tp: int, rows: int) -> float:
    total = 0.0
    for linear in group.low_rank:
        rank = linear.rank or 0
        inner, columns = (rank / tp, linear.outputs) if style == NAIVE else (rank, linear.outputs)
        total += cluster.product_seconds(rows, inner, columns / (tp if style == BTP else 1))
    if group.dense:
        columns = sum(linear.outputs for linear in group.dense)
        inner, columns = (
            (group.inputs / tp, columns) if group.closes else (group.inputs, columns / tp)
        )
        total += cluster.product_seconds(rows, inner, columns)
    return total


def message_seconds(cluster: Cluster, messages: tuple[Message, ...], tp: int, rows: int) -> float:
    """Seconds of collectives in a group of neighbours."""
    if tp == 1:
        return 0.0
    total = 0.0
    for message in messages:
        size = cluster.itemsize * rows * message.elements
        kind = cluster.gather_seconds if message.half else cluster.all_reduce_seconds
        total += kind(size, tp)
    return total


def head_seconds(cluster: Cluster, head: Linear, tp: int, rows: int) -> float:
    """Seconds of a forward pass's product with the vocabulary, and of the loss."""
    # An eager loss copies all logits, and goes over them for their logarithms and exponentials.
    loss = (cluster.eager - 1) * cluster.pass_seconds(
        2 * cluster.itemsize * rows * _LOSSES * head.outputs
    )
    if head.rank is None:
        return loss + cluster.product_seconds(rows, head.inputs, head.outputs / tp)
    first = cluster.product_seconds(rows, head.read, head.rank)
    return loss + first + cluster.product_seconds(rows, head.rank, head.outputs / tp)
