"""What a strategy's step takes: seconds, bytes and memory, each by its cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tensorize.base import printer
from tensorize.distributed.strategy.cluster import Cluster
from tensorize.distributed.strategy.memory import (
    GRADIENTS,
    HALF,
    OPTIMIZER,
    WEIGHTS,
    host_bytes,
    memory_of,
)
from tensorize.distributed.strategy.over_layers import OverLayers
from tensorize.distributed.strategy.seconds import (
    BACK,
    ENDS,
    first_seconds,
    head_seconds,
    matrices,
    message_seconds,
    other_seconds,
    starts,
)
from tensorize.distributed.strategy.strategy import BTP, INPUTS, KEEP, PRODUCTS, Strategy
from tensorize.distributed.strategy.volumes import (
    Message,
    backward_messages,
    elements,
    forward_messages,
)
from tensorize.distributed.strategy.workload import Workload
from tensorize.training.host_updates import UpdateRates, best_stride, update_seconds

_UPDATED = WEIGHTS + GRADIENTS + OPTIMIZER + OPTIMIZER + HALF
"""Bytes that the update of a parameter reads and writes: masters, gradients, states, the copy."""
ROOM = 0.9
"""The share of the memory that a plan may fill: the rest is the libraries' and fragments."""


@dataclass(frozen=True)
class Estimate:
    """Figures of one strategy on one device: the causes of its seconds, bytes and memory.

    ``seconds`` are by cause and add up, ``sent`` are payloads of a step, ``memory`` is of the stage
    that holds most, ``host`` what is on the host. ``bubble`` is the share of the pipeline's time in
    which the slowest stage waits. ``stages`` are for the simulator, where asked for.
    """

    strategy: Strategy
    seconds: dict[str, float]
    sent: dict[str, float]
    memory: dict[str, float]
    host: float
    bubble: float
    room: float
    layers: int = field(repr=False)
    stages: tuple[StageSeconds, ...] = field(default=(), repr=False)

    @cached_property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @cached_property
    def bytes(self) -> float:
        """Bytes of memory on a device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room

    def __str__(self) -> str:
        def parts(figures: dict[str, float], text: Callable[[float], str]) -> str:
            return ", ".join(f"{name} {text(value)}" for name, value in figures.items())

        fits = "" if self.fits else f": does not fit into {printer.bytes_(self.room)}"
        lines = [
            str(self.strategy),
            f"  a step {printer.seconds(self.total)}: {parts(self.seconds, printer.seconds)}",
            f"  sent {parts(self.sent, printer.bytes_) or 'nothing'}",
            f"  memory {printer.bytes_(self.bytes)}{fits}: {parts(self.memory, printer.bytes_)}",
            f"  bubble {printer.percent(self.bubble)}",
        ]
        if self.host:
            lines.append(f"  on the host {printer.bytes_(self.host)} a device")
        return printer.plain("\n".join(lines))


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one micro-batch on a stage: forward and backward, and of one message to the next.

    Of ``forward`` and ``backward`` the collectives take ``forward_sent`` and ``backward_sent``;
    ``reduce`` are the gradients' collectives of a step, ``update`` the optimizer's.
    """

    forward: float
    backward: float
    forward_sent: float
    backward_sent: float
    send: float
    reduce: float
    update: float


class Estimator:
    """Figures of strategies for one model on one kind of devices; what they share is kept."""

    def __init__(self, workload: Workload, cluster: Cluster, sequence: int) -> None:
        self.workload, self.cluster, self.sequence = workload, cluster, sequence
        self.over = OverLayers(workload)
        rates = update_rates(cluster)
        self._on_host = update_seconds(1.0, rates, best_stride(rates))
        self._held: dict[Strategy, dict[str, float]] = {}

    def memory(self, strategy: Strategy) -> dict[str, float]:
        """Bytes by cause on the device that holds most."""
        if strategy not in self._held:
            self._held[strategy] = memory_of(
                self.over, strategy, self.sequence, self.cluster.itemsize
            )
        return self._held[strategy]

    def __call__(self, strategy: Strategy, *, stages: bool = False) -> Estimate:
        """The figures; with ``stages`` also those of every stage, for the simulator."""
        memory = self.memory(strategy)
        compute, sent = self._compute(strategy), self._messages(strategy)
        send = self._send(strategy)
        pp, micro = strategy.pp, strategy.micro
        computed, messages = compute[0] + compute[1], sent[0] + sent[1]
        each = computed + messages + 2 * send
        slowest = int(np.argmax(each))
        whole = float(each.sum() + (micro - 1) * each[slowest])
        waits = whole - micro * float(each[slowest])
        reduce, hidden = self._reduce(strategy, compute, sent)
        update = self._update(strategy)
        seconds = {
            "compute": micro * float(computed[slowest]),
            "tensor parallel": micro * float(messages[slowest]),
            "sends": micro * float(2 * send),
            "bubble": waits,
            "data parallel": float(np.max(reduce - hidden)),
            "update": float(np.max(update)),
        }
        own = zip(*compute, *sent, np.full(pp, send), reduce, update, strict=True)
        return Estimate(
            strategy,
            {cause: taken for cause, taken in seconds.items() if taken},
            self._sent(strategy),
            memory,
            host_bytes(self.workload, strategy),
            waits / whole,
            ROOM * self.cluster.memory,
            len(self.workload.layers),
            tuple(StageSeconds(*map(float, each)) for each in own) if stages else (),
        )

    # ------------------------------------------------------------------------- by the micro-batch

    def _compute(self, strategy: Strategy) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of forward and backward pass by stage: a backward pass is two forward ones."""
        cluster, pp, tp, style = self.cluster, strategy.pp, strategy.tp, strategy.style
        rows, how = strategy.rows * self.sequence, (style, tp, strategy.rows)
        first = self.over.stages(
            *(pp, ("first", *how)),
            lambda layer: first_seconds(cluster, layer, style, tp, rows),
        )
        other = self.over.stages(
            *(pp, ("other", *how)),
            lambda layer: other_seconds(cluster, layer, style, tp, rows, self.sequence),
        )
        begun = cluster.start * self.over.stages(
            *(pp, ("starts", *how[:2])), lambda layer: starts(layer, style, tp)
        )
        forward, backward = first + other + begun, 2 * (first + other) + BACK * begun
        if strategy.checkpoint == PRODUCTS:
            backward = backward + other
        elif strategy.checkpoint == INPUTS:
            backward = backward + forward
        head, begun = head_seconds(cluster, self.workload.head, tp, rows), ENDS * cluster.start
        forward[-1] += head + begun
        backward[-1] += 2 * head + BACK * begun
        return forward, backward

    def _messages(self, strategy: Strategy) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the collectives of a forward and a backward pass by stage."""
        pp, tp, style = strategy.pp, strategy.tp, strategy.style
        if tp == 1:
            return np.zeros(pp), np.zeros(pp)
        cluster, rows = self.cluster, strategy.rows * self.sequence
        forward, backward = (
            self.over.stages(
                *(pp, (of.__name__, style, tp, strategy.rows)),
                lambda layer, of=of: message_seconds(cluster, of(layer, style), tp, rows),
            )
            for of in (forward_messages, backward_messages)
        )
        if self._sends_again(strategy):
            backward = backward + forward
        # The embedding's outputs, and the gradient of the head's inputs.
        end = message_seconds(cluster, (Message(self.workload.width),), tp, rows)
        forward[0] += end
        backward[-1] += end
        return forward, backward

    @staticmethod
    def _sends_again(strategy: Strategy) -> bool:
        """Whether what is computed again is sent again: BTP keeps what it has sent."""
        low = strategy.style == BTP and strategy.checkpoint == PRODUCTS
        return strategy.checkpoint != KEEP and not low

    def _send(self, strategy: Strategy) -> float:
        """Seconds of a micro-batch from one stage to the next."""
        if strategy.pp == 1:
            return 0.0
        apart = strategy.tp * strategy.dp
        return self.cluster.send_seconds(self._boundary(strategy), apart * strategy.pp)

    def _boundary(self, strategy: Strategy) -> float:
        """Bytes that a device hands on to the next stage."""
        size = self.cluster.itemsize * strategy.rows * self.sequence * self.workload.width
        return size / (strategy.tp if strategy.style == BTP else 1)

    # ------------------------------------------------------------------------------- by the step

    def _parameters(self, strategy: Strategy) -> np.ndarray:
        """Parameters by stage, on one device of a tensor-parallel group."""
        pp = strategy.pp
        found = self.over.stages(pp, "parameters", lambda layer: layer.parameters)
        found[0] += self.workload.ends / min(pp, 2)
        if pp > 1:
            found[-1] += self.workload.ends / 2
        return found / strategy.tp

    def _reduce(
        self,
        strategy: Strategy,
        compute: tuple[np.ndarray, np.ndarray],
        sent: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the data-parallel collectives by stage, and how many of them hide.

        They run beside what is computed, but for those of one layer, the last.
        """
        count, dp = self._parameters(strategy), strategy.dp
        if dp == 1:
            return np.zeros(strategy.pp), np.zeros(strategy.pp)

        def gather(size: np.ndarray) -> np.ndarray:
            return self.cluster.gather_seconds(size, dp, strategy.tp)

        forward, backward = compute[0] + sent[0], compute[1] + sent[1]
        if strategy.sharded:
            times = strategy.micro
            whole = times * (2 * gather(HALF * count) + gather(GRADIENTS * count))
            beside = times * (forward + backward)
        else:
            whole = gather(GRADIENTS * count) + gather(HALF * count)
            beside = backward
        layers = len(self.workload.layers) / strategy.pp
        return whole, np.minimum(beside, whole * (1 - 1 / max(layers, 1)))

    def _update(self, strategy: Strategy) -> np.ndarray:
        """Seconds of the optimizer's update by stage."""
        count = self._parameters(strategy) / strategy.dp
        if not strategy.offload:
            if self.cluster.is_processor:
                begun = self.over.stages(
                    *(strategy.pp, "tensors"), lambda layer: matrices(layer) + layer.norms
                )
                return count / self.cluster.updated + self.cluster.start * begun
            return self.cluster.pass_seconds(_UPDATED * count)
        return count * self._on_host

    def _sent(self, strategy: Strategy) -> dict[str, float]:
        """Bytes of a step by cause, payloads on the device that has most of them."""
        tp, dp, micro, style = strategy.tp, strategy.dp, strategy.micro, strategy.style
        rows = self.cluster.itemsize * strategy.rows * self.sequence * micro
        found = {}
        if tp > 1:
            forward, backward = (
                self.over.stages(
                    *(strategy.pp, ("sent", of.__name__, style)),
                    lambda layer, of=of: elements(of(layer, style)),
                )
                for of in (forward_messages, backward_messages)
            )
            times = 2 if self._sends_again(strategy) else 1
            most = float((times * forward + backward).max()) + self.workload.width
            found["tensor parallel"] = rows * most
        if strategy.pp > 1:
            found["pipeline"] = 2 * micro * self._boundary(strategy)
        if dp > 1:
            count = float(self._parameters(strategy).max())
            each = (2 * HALF + GRADIENTS) * micro if strategy.sharded else HALF + GRADIENTS
            found["data parallel"] = count * each
        if strategy.offload:
            count = float(self._parameters(strategy).max()) / dp
            found["host"] = count * (GRADIENTS + HALF)
        return found


def update_rates(cluster: Cluster) -> UpdateRates:
    """How fast a cluster's devices and hosts update parameters."""
    device = cluster.bandwidth * cluster.passes / _UPDATED
    return UpdateRates(cluster.updates, device, cluster.host, cluster.host)
