"""Codes of all of a model's weights, within a limit on bytes or on what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tensorize.base.errors import BudgetError
from tensorize.coding import groups
from tensorize.coding.groups import Group
from tensorize.passes.filling.fill import Expected, Filling, worth
from tensorize.passes.predict.predictor import Predictor

_AIMED = 0.992
"""The share of a limit on bytes that is aimed at: what is written is up to so much more."""

_TRIES = 6


@dataclass(frozen=True)
class Filled:
    """Groups of tensors as they are coded, what was expected of them, and the limit on bytes."""

    groups: tuple[tuple[tuple[Tensor, ...], Group, bytes], ...]
    expected: Expected

    @property
    def bytes(self) -> int:
        return sum(len(data) for *_, data in self.groups)


def within_bytes(filling: Filling, limit: int) -> Filled:
    """Codes of at most so many bytes.

    Raises:
        BudgetError: there are none.
    """
    aimed = _AIMED * limit
    for _ in range(_TRIES):
        expected = filling.within_bytes(aimed) if aimed > 0 else None
        if expected is None:
            break
        made = coded(filling, expected)
        if made.bytes <= limit:
            return made
        aimed *= _AIMED * limit / made.bytes
    least = filling.least
    raise BudgetError(
        f"the codes of the weights take {least:,.0f} bytes at least, and {max(limit, 0):,} are left "
        "for them",
        way_out="a larger file=, or a plan with fewer parameters",
    )


def coded(filling: Filling, expected: Expected) -> Filled:
    """The codes of the weights at some θ."""
    made = []
    for group in filling.groups():
        tensors = tuple(tensor for weight in group for tensor in weight.tensors)
        matrices = [each for weight in group for each in weight.coded(expected.theta)]
        made.append((tensors, *groups.encode(matrices)))
    return Filled(tuple(made), expected)


@dataclass(frozen=True)
class Rise:
    """What codes cost beyond what the plan costs already: from sums of distortions to the loss."""

    predictor: Predictor
    planned: float
    refine: str | None

    def of(self, distortion: float) -> tuple[float, tuple[float, float]]:
        """(expected rise, its 90 % interval)."""
        raw = worth(self.predictor) * distortion
        before, _ = self.predictor.predict(self.planned, self.refine)
        after, (low, high) = self.predictor.predict(self.planned + raw, self.refine)
        return max(after - before, 0.0), (max(low - before, 0.0), max(high - before, 0.0))

    def distortion(self, loss: float) -> float:
        """The largest sum of distortions whose expected rise is within a limit."""
        before, _ = self.predictor.predict(self.planned, self.refine)
        raw = self.predictor.inverse(before + loss, self.refine) - self.planned
        return max(raw, 0.0) / worth(self.predictor)


def summary(expected: Expected, rise: Rise | None) -> Mapping[str, object]:
    """What the manifest says of codes in a metric."""
    known: dict[str, object] = {"theta": expected.theta, "distortion": expected.distortion}
    if rise is not None:
        loss, interval = rise.of(expected.distortion)
        known |= {"loss": loss, "loss_interval": list(interval)}
    return known
