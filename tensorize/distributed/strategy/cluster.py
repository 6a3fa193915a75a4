"""What devices do in how much time: products, passes over memory, messages by link.

A product runs at a share of the peak that falls with its thinnest side; a message takes a latency
and then its bytes at the bandwidth of its links (the alpha-beta model). Which links those are
follows from where the members of a group stand in their nodes.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorize.base import files
from tensorize.base.errors import TensorizeError, check_one_of
from tensorize.base.records import plain, record

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
    ``links`` and ``passes`` are the shares of these that are reached. ``itemsize``: bytes of a
    number that it computes with and sends.

    What holds processors back, and GPUs hide or fuse: ``attention`` is the share of a product's
    speed that attention has, ``eager`` how many times over a layer's operations beside products
    write and read what is saved, ``start`` the seconds that starting a product takes, and
    ``updated`` how many parameters a second it updates (0: the device is no processor).
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
    itemsize: int = 2
    attention: float = 1.0
    eager: float = 1.0
    start: float = 0.0
    updated: float = 0.0

    def __str__(self) -> str:
        rates = f"{self.peak * self.best / 1e9:.4g} GFLOP/s, half of it at a side of"
        half = -self.thin * math.log1p(-0.5)
        eager = (
            f"; an operation starts in {1e6 * self.start:.3g} us, attention has "
            f"{100 * self.attention:.0f} % of a product's speed, a layer passes {self.eager:.2g} "
            "times over memory"
        )
        return (
            f"{self.name}: {rates} {half:.0f}; memory {self.bandwidth * self.passes / 1e9:.3g} "
            f"GB/s; a message {1e6 * self.latency:.3g} us and {self.links * self.link / 1e9:.3g} "
            f"GB/s in a node of {self.node}, {self.links * self.network / 1e9:.3g} out of it; "
            f"{self.updates / 1e6:.4g} M parameters a second updated on the host"
            f"{eager if self.is_processor else ''}"
        )

    @property
    def is_processor(self) -> bool:
        """Whether the devices are processors: their memory is the host's."""
        return self.updated > 0

    def product_seconds(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of (rows, inner) @ (inner, columns): by its FLOPs or by its bytes."""
        moved = self.itemsize * (rows * inner + inner * columns + rows * columns)
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


MEASURED = "measured"
"""The name of what ``tensorize calibrate --distributed`` found from this machine."""


def place() -> Path:
    """Where measured figures are kept."""
    return files.of_this_machine("cluster", f"{platform.node()} {torch.__version__}")


def keep(cluster: Cluster) -> Path:
    """Write measured figures to where ``"measured"`` is looked for."""
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_at_once(path, json.dumps(plain(cluster), indent=1))
    return path


def _kept() -> Cluster:
    found = files.read_records(place())
    try:
        return record(Cluster, found)
    except (KeyError, TypeError, ValueError) as error:
        raise TensorizeError(
            "no group of processes was measured from this machine, or by another version",
            way_out="torchrun --nproc-per-node 2 -m tensorize.cli calibrate --distributed",
        ) from error


def cluster_of(machine: str | Cluster) -> Cluster:
    """A cluster by its name, as it is, or as it was measured here.

    Raises:
        TensorizeError: there is none of that name, or none was measured.
    """
    if machine == MEASURED:
        return _kept()
    if isinstance(machine, str):
        return CLUSTERS[check_one_of("machine", machine, (*CLUSTERS, MEASURED))]
    if not isinstance(machine, Cluster):
        raise TensorizeError(
            f"machine= is a name or a Cluster, got {machine!r}", way_out='machine="h100"'
        )
    return machine
