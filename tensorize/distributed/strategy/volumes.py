"""What a layer sends within a tensor-parallel group, in each style of splitting it.

Per row of input (a token), in elements; the statistics of norms are float32, two elements each.

* Megatron (Shoeybi et al. 2019): one sum where a pair of weights closes, and one of the gradient
  where it opens.
* naive: every factor pair is split by its rank, as if it were such a pair of weights: one sum of
  its outputs, and one of the gradient of its inputs.
* BTP (Wang et al. 2025, "BOOST"): the residual stream stays split, first factors by their rows and
  second ones by their columns. What is summed are the first products, those of one input together,
  and with them the sums of squares of the norm that they read. A dense weight there gathers its
  inputs, or scatters its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tensorize.distributed.strategy.strategy import BTP, MEGATRON, NAIVE
from tensorize.distributed.strategy.workload import Group, Layer

_STATISTIC = 2


@dataclass(frozen=True)
class Message:
    """A collective: elements a row of the whole tensor; ``half``: a gather or a scatter alone."""

    elements: int
    half: bool = False


def forward_messages(layer: Layer, style: str) -> tuple[Message, ...]:
    return tuple(message for group in layer.groups for message in _of_group(group, style, True))


def backward_messages(layer: Layer, style: str) -> tuple[Message, ...]:
    return tuple(message for group in layer.groups for message in _of_group(group, style, False))


def _of_group(group: Group, style: str, forward: bool) -> Iterator[Message]:
    if style == BTP:
        if group.firsts:
            yield Message(group.ranks + _STATISTIC * (not group.closes))
        if group.dense and not group.closes:
            yield Message(group.inputs, half=True)
        if group.dense and group.closes:
            yield Message(sum(linear.outputs for linear in group.dense), half=True)
    if style == NAIVE:
        for linear in group.low_rank:
            yield Message(linear.outputs if forward else linear.inputs)
    if style in (NAIVE, MEGATRON):
        for_these = group.low_rank if style == MEGATRON else ()
        assert not for_these, "Megatron's style is for dense weights"
        if group.dense and group.closes and forward:
            yield Message(sum(linear.outputs for linear in group.dense))
        if group.dense and not group.closes and not forward:
            yield Message(group.inputs)


def elements(messages: tuple[Message, ...]) -> int:
    """All of them, where a gather or a scatter is half of a sum."""
    return sum(message.elements * (1 if message.half else 2) for message in messages) // 2
