"""What devices do in how much time: products, passes over memory, messages by link.

A product runs at a share of the peak that falls with its thinnest side; a message takes a latency
and then its bytes at the bandwidth of its links (the alpha-beta model). Which links those are
follows from where the members of a group stand in their nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tensorize.base.errors import TensorizeError, check_one_of

# Fitted to the three rows of the 7B model in BOOST's table alone (`python -m benchmarks.strategy`).
_BEST, _THIN, _LINKS = 0.968, 593.0, 0.7975
_PASSES = 0.85
"""The share of the memory's bandwidth that passes over it reach."""
_LATENCY = 15e-6


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes; FLOP/s, bytes, and bytes a second in one direction, each of one device.

    ``link`` is what a device sends within its node, ``network`` its share of what the node sends,
    ``host`` what it exchanges with the host's memory, ``updates`` how many parameters a second its
    share of the host's processor updates. ``direct``: the links of a node lead to each of the
    others, so that few members use few of them; else a switch joins them. ``best``, ``thin``,
    ``links`` and ``passes`` are the shares of these that are reached.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    node: int
    link: float
    network: float
    host: float
    updates: float
    direct: bool = False
    best: float = _BEST
    thin: float = _THIN
    links: float = _LINKS
    passes: float = _PASSES
    latency: float = _LATENCY

    def product_seconds(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of (rows, inner) @ (inner, columns): by its FLOPs or by its bytes."""
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        flops = 2 * rows * inner * columns
        return max(
            flops / (self.peak * self.share(min(rows, inner, columns))), self.pass_seconds(moved)
        )

    def share(self, thinnest: float) -> float:
        """The share of the peak that products reach whose thinnest side is this."""
        return self.best * -math.expm1(-thinnest / self.thin)

    def pass_seconds(self, moved: Any) -> Any:
        """Seconds of reading and writing so many bytes."""
        return moved / (self.bandwidth * self.passes)

    def rate(self, members: int, apart: int) -> float:
        """Bytes a second of a ring of members that stand ``apart`` devices from each other."""
        inside = max(1, min(members, self.node // max(apart, 1)))
        within = self.link
        if self.direct:
            within *= max(inside - 1, 1) / max(self.node - 1, 1)
        if members * apart > self.node and members > 1:
            # A ring leaves a node once for all of its members there: these share their adapters.
            return min(within if inside > 1 else math.inf, self.network * inside) * self.links
        return within * self.links

    def all_reduce_seconds(self, size: float, members: int, apart: int = 1) -> float:
        """Seconds of a sum of ``size`` bytes that all members have and get."""
        return 2 * self.gather_seconds(size, members, apart) - self._start(members)

    def gather_seconds(self, size: Any, members: int, apart: int = 1) -> Any:
        """Seconds of an all-gather, or of a reduce-scatter, of ``size`` bytes altogether."""
        if members == 1:
            return 0.0
        moved = (members - 1) / members * size
        return self._start(members) + moved / self.rate(members, apart)

    def send_seconds(self, size: float, span: int) -> float:
        """Seconds from a stage to the next, in a pipeline that spans so many devices."""
        inside = span <= self.node
        return self.latency + size / (self.links * (self.link if inside else self.network))

    def _start(self, members: int) -> float:
        return self.latency * math.log2(members) if members > 1 else 0.0


# Makers' figures: bfloat16 without sparsity; a MI250X is two devices. ``updates`` are of Adam in
# float32, 28 bytes a parameter through the host's memory.
CLUSTERS = {
    c.name: c
    for c in (
        Cluster("a100-40", 312e12, 40e9, 1.555e12, 4, 300e9, 25e9, 25e9, 1.5e9, direct=True),
        Cluster("a100-80", 312e12, 80e9, 2.04e12, 8, 300e9, 25e9, 25e9, 1.5e9),
        Cluster("h100", 989e12, 80e9, 3.35e12, 8, 450e9, 50e9, 50e9, 2.5e9),
        Cluster("h200", 989e12, 141e9, 4.8e12, 8, 450e9, 50e9, 50e9, 2.5e9),
        Cluster("mi250x", 191.5e12, 64e9, 1.6e12, 8, 150e9, 12.5e9, 36e9, 0.8e9),
        Cluster("mi300x", 1307e12, 192e9, 5.3e12, 8, 448e9, 50e9, 50e9, 2.5e9, direct=True),
    )
}


def cluster_of(machine: str | Cluster) -> Cluster:
    """A cluster by its name, or as it is.

    Raises:
        TensorizeError: there is none of that name, or a figure of it makes no sense.
    """
    if isinstance(machine, str):
        return CLUSTERS[check_one_of("machine", machine, CLUSTERS)]
    if not isinstance(machine, Cluster):
        raise TensorizeError(
            f"machine= is a name or a Cluster, got {machine!r}", way_out='machine="h100"'
        )
    return machine
