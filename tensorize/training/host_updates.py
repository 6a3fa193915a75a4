"""How long an optimizer's update takes whose states are on the host.

The states are in equal sub-groups. Every ``stride``-th one is fetched, updated on the device and
sent back; the others are updated on the host, and their parameters sent to the device. Host, device
and both directions of the link work at the same time (Maurya et al. 2024, "Deep Optimizer States").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

FETCHED, SENT = 12, 2
"""Bytes a parameter: its master and two states, and its copy in half precision."""
STRIDES = (0, 1, 2, 3, 4, 5, 6, 8)
GROUPS = 20


@dataclass(frozen=True)
class UpdateRates:
    """Parameters a second that host and device update, bytes a second to the device and back."""

    host: float
    device: float
    up: float
    down: float


@dataclass(frozen=True)
class Span:
    """What a stream does from when to when."""

    stream: str
    what: str
    start: float
    end: float


def on_device(group: int, stride: int) -> bool:
    """Whether a sub-group is updated on the device; with stride 0 none is."""
    return stride > 0 and (group + 1) % stride == 0


def update_spans(
    parameters: float, rates: UpdateRates, stride: int, groups: int = GROUPS
) -> Iterator[Span]:
    """The schedule of one update."""
    free: dict[str, float] = defaultdict(float)

    def taken(stream: str, what: str, seconds: float, after: float = 0.0) -> Span:
        start = max(free[stream], after)
        free[stream] = start + seconds
        return Span(stream, what, start, free[stream])

    each = parameters / groups
    for group in range(groups):
        if on_device(group, stride):
            fetched = taken("up", f"fetch {group}", FETCHED * each / rates.up)
            updated = taken("device", f"update {group}", each / rates.device, fetched.end)
            back = taken("down", f"back {group}", FETCHED * each / rates.down, updated.end)
            yield from (fetched, updated, back)
        else:
            updated = taken("host", f"update {group}", each / rates.host)
            yield from (updated, taken("up", f"send {group}", SENT * each / rates.up, updated.end))


def update_seconds(
    parameters: float, rates: UpdateRates, stride: int, groups: int = GROUPS
) -> float:
    """Seconds of one update."""
    return max(span.end for span in update_spans(parameters, rates, stride, groups))


def best_stride(rates: UpdateRates, groups: int = GROUPS) -> int:
    """The stride of the shortest update; how many parameters there are changes nothing."""
    return min(STRIDES, key=lambda stride: update_seconds(1.0, rates, stride, groups))
