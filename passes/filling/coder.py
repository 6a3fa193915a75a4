"""Codes of all of a model's weights, within a limit on bytes or on what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tensorize.base.errors import BudgetError
from tensorize.coding import groups
from tensorize.coding.groups import Coded, Group
from tensorize.passes.allocate.forms import BITS
from tensorize.passes.filling.fill import Expected, Filling
from tensorize.passes.predict.predictor import Predictor

_AIMED = 0.995
"""The share of a limit on bytes that is aimed at: what is written is up to so much more."""

_NEAR = 0.985
"""The share of it that is enough."""

_TRIES = 6


@dataclass(frozen=True)
class Filled:
    """Groups of tensors as they are coded, what was expected of them, and what was found: the sum
    of distortions, and the largest error of an entry of each tensor, by its id."""

    groups: tuple[tuple[tuple[Tensor, ...], Group, bytes], ...]
    expected: Expected
    distortion: float
    errors: Mapping[int, float]

    @property
    def bytes(self) -> int:
        return sum(len(data) for *_, data in self.groups)

    @property
    def numbers(self) -> dict[int, Tensor]:
        """What is read from the bytes, in float32, by the id of each tensor."""
        return {
            id(tensor): numbers
            for tensors, group, data in self.groups
            for tensor, numbers in zip(tensors, groups.decode(group, memoryview(data)), strict=True)
        }


def within_bytes(
    filling: Filling, limit: int, beside: Callable[[Filled], int], about: int = 0
) -> Filled:
    """Codes of at most so many bytes, with what is ``beside`` them in the file: ``about`` so much.

    Raises:
        BudgetError: there are none.
    """
    best: Filled | None = None
    longer, margin = 1.0, _AIMED
    if not filling.weights:
        nothing = Filled((), Expected(0.0, 0.0, 0.0), 0.0, {})
        about = beside(nothing)
        best = nothing if about <= limit else None
    for _ in range(_TRIES if filling.weights else 0):
        aimed = max(margin * (limit - about) / longer, 1.0)
        expected = filling.within_bytes(aimed)
        if expected is None:
            break
        made = coded(filling, expected)
        about = beside(made)
        size = made.bytes + about
        if size <= limit and (best is None or made.bytes > best.bytes):
            best = made
        if size > limit:
            margin *= _AIMED
        finest = expected.bytes < 0.9 * aimed
        if best is not None and (finest or best.bytes + about >= _NEAR * limit):
            break
        longer = made.bytes / expected.bytes
    if best is not None:
        return best
    raise BudgetError(
        f"a file takes about {filling.least + about:,.0f} bytes at least, and {limit:,} are "
        "allowed",
        way_out="a larger file=, or a plan with fewer parameters",
    )


def coded(filling: Filling, expected: Expected) -> Filled:
    """The codes of the weights at some θ."""
    made, lost = [], 0.0
    errors: dict[int, float] = {}
    for group, matrices in filling.codes(expected.theta):
        tensors = [tensor for weight in group for tensor in weight.tensors]
        of = dict(zip(map(id, tensors), matrices, strict=True))
        lost += sum(weight.lost([of[id(t)] for t in weight.tensors]) for weight in group)
        made.append((tuple(tensors), *groups.encode(matrices)))
        errors |= {id(t): _error(t, each) for t, each in zip(tensors, matrices, strict=True)}
    return Filled(tuple(made), expected, lost, errors)


def _error(tensor: Tensor, made: Coded) -> float:
    """The largest error of an entry."""
    off = (
        made.numbers.reshape(tensor.shape).to(tensor.dtype).double()
        - tensor.detach().double().cpu()
    )
    return float(off.abs().max()) if off.numel() else 0.0


def rise(predictor: Predictor, distortion: float) -> tuple[float, tuple[float, float]]:
    """What codes are expected to add to the loss, and its 90 % interval."""
    return predictor.with_bits.predict(_worth(predictor) * distortion)


def allowed(predictor: Predictor, loss: float) -> float:
    """The largest sum of distortions whose expected rise is within a limit."""
    return predictor.with_bits.inverse(loss) / _worth(predictor)


def _worth(predictor: Predictor) -> float:
    """What a distortion of codes counts: as one of integers, where those were tried."""
    return predictor.worth.get(BITS, 1.0)


def summary(made: Filled, cost: tuple[float, tuple[float, float]] | None) -> Mapping[str, object]:
    """What the manifest says of codes in a metric; ``cost`` is the loss, with its interval."""
    known: dict[str, object] = {
        "theta": made.expected.theta,
        "bytes": made.bytes,
        "expected_bytes": round(made.expected.bytes),
        "expected_distortion": made.expected.distortion,
    }
    if cost is not None:
        loss, interval = cost
        known |= {"loss": loss, "loss_interval": list(interval)}
    return known
