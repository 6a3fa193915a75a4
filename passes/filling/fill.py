"""One θ for a model: every entry of its weights loses as much, where it is rounded at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tensorize.coding.groups import Coded, sizes_of
from tensorize.passes.filling.refit import Refit
from tensorize.passes.filling.weights import Weight

GROUPED = 1 << 22
"""Entries up to which matrices share the tables of their streams: they are decoded together."""

_FINEST, _COARSEST = math.log(1e-60), math.log(1e30)
"""Of the logarithm of θ, in the unit of the loss."""

_NEAR = 0.002
"""How near to a limit what is expected is to come, relative."""

_TRIES = 40


@dataclass(frozen=True)
class Expected:
    """What a θ is expected to give: bytes of the weights' codes, and the sum of distortions."""

    theta: float
    bytes: float
    distortion: float


@dataclass(frozen=True, eq=False)
class Filling:
    """The weights of a model that are coded in their metrics."""

    weights: Sequence[Weight]
    refit: Refit | None = None
    _known: dict[float, Expected] = field(default_factory=dict)

    def groups(self) -> Iterator[list[Weight]]:
        """Weights whose codes share streams, in their order."""
        group: list[Weight] = []
        count = 0
        for weight in self.weights:
            size = sum(tensor.numel() for tensor in weight.tensors)
            if group and count + size > GROUPED:
                yield group
                group, count = [], 0
            group.append(weight)
            count += size
        if group:
            yield group

    def codes(self, theta: float) -> Iterator[tuple[list[Weight], list[Coded]]]:
        """The codes of every group: with data, chosen for the inputs that weights really meet."""
        found = {} if self.refit is None else self.refit.codes(self.weights, theta)
        for group in self.groups():
            matrices: list[Coded] = []
            for weight in group:
                known = [found.pop(id(tensor)) for tensor in weight.tensors if found]
                matrices += known or weight.coded(theta)
            yield group, matrices

    def expected(self, theta: float) -> Expected:
        """Without rounding anything one after the other, and without coding."""
        if theta not in self._known:
            size, lost = 0.0, 0.0
            for group in self.groups():
                coded: list[Coded] = []
                for weight in group:
                    found, own = weight.expected(theta)
                    coded += found
                    lost += own
                size += sizes_of(coded)
            self._known[theta] = Expected(theta, size, lost)
        return self._known[theta]

    def within_bytes(self, limit: float) -> Expected | None:
        """The finest θ whose codes are expected to take so many bytes; None: there is none."""
        found = _found(
            lambda x: math.log(self.expected(math.exp(x)).bytes / limit), self._start, -1
        )
        return None if found is None else self.expected(math.exp(found))

    def within_distortion(self, limit: float) -> Expected:
        """The coarsest θ whose sum of distortions is within a limit."""

        def excess(x: float) -> float:
            return math.log(limit / max(self.expected(math.exp(x)).distortion, 1e-300))

        found = _found(excess, self._start, 1)
        return self.expected(math.exp(_FINEST if found is None else found))

    @property
    def least(self) -> float:
        """The bytes that are expected where next to nothing is left of the weights."""
        if not self.weights:
            return 0.0
        return self.expected(math.exp(_COARSEST)).bytes

    @property
    def _start(self) -> float:
        """The logarithm of a θ that is neither far too fine nor too coarse."""
        if self._known:
            return math.log(next(reversed(self._known)))
        count = sum(tensor.numel() for weight in self.weights for tensor in weight.tensors)
        return math.log(
            max(sum(weight.whole for weight in self.weights), 1e-30) / (100 * max(count, 1))
        )


def _found(excess: Callable[[float], float], start: float, side: int) -> float | None:
    """Where a function that falls comes to zero, nearly: on the side where its sign is ``side``.

    By secants that stay between what is known to be above and below.
    """
    low, high, x = _FINEST, _COARSEST, start
    points: list[tuple[float, float]] = []
    best = None
    for _ in range(_TRIES):
        y = excess(x)
        if y * side >= 0:
            best = x
            if abs(y) <= _NEAR:
                break
        if y > 0:
            low = x
        else:
            high = x
        if high - low < 1e-6:
            break
        points = [*points, (x, y)][-2:]
        x = _secant(points, side * _NEAR / 2)
        if x is None or not low < x < high:
            x = (
                (low + high) / 2
                if low > _FINEST and high < _COARSEST
                else points[-1][0] + 4 * (1 if y > 0 else -1)
            )
            x = min(max(x, _FINEST), _COARSEST)
    return best


def _secant(points: Sequence[tuple[float, float]], aim: float) -> float | None:
    """Where the line through two points is at ``aim``; through one, of a fall of one in three."""
    (a, y), *others = points[::-1]
    slope = -1 / 3
    if others:
        b, z = others[0]
        slope = (y - z) / (a - b)
    return a + (aim - y) / slope if slope < 0 else None
