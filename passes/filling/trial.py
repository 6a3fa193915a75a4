"""What codes cost on data that they were not chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tensorize.base.errors import BudgetError
from tensorize.passes.filling.refit import Refit
from tensorize.passes.filling.weights import Weight
from tensorize.passes.observe.loss import LossOption, PreservedLoss, split
from tensorize.passes.predict.predictor import interval
from tensorize.passes.predict.trials import Reference

_NEAR = 0.93
"""Of a limit on the loss: what is near enough to it."""

_AIMED = 0.97

_TRIES = 6

_GROWTH = 1.1
"""How the loss grows with θ: by this power."""


@dataclass(frozen=True)
class Cost:
    """The rise of the loss of a model that is coded at some θ, and its 90 % interval."""

    theta: float
    loss: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Trial:
    """Codes of a model chosen on some batches, and measured against it on others."""

    weights: Sequence[Weight]
    refit: Refit
    reference: Reference

    @classmethod
    def of(
        cls,
        model: nn.Module,
        weights: Sequence[Weight],
        refit: Refit,
        loss_fn: LossOption,
    ) -> Trial | None:
        """Part of a refit's data is held out; None: there are too few to be."""
        learnt, held_out = split(tuple(refit.batches))
        if not held_out:
            return None
        loss = PreservedLoss.fit(model, refit.batches, loss_fn)
        return cls(weights, refit.on(learnt), Reference(model, held_out, loss))

    def cost(self, theta: float) -> Cost:
        codes = self.refit.codes(self.weights, theta)
        made = {
            name: codes[id(p)].numbers.reshape(p.shape).to(p)
            for name, p in self.refit.model.named_parameters()
            if id(p) in codes
        }
        found = self.reference.measure(made)
        return Cost(theta, found.rise, interval(found.rise, found.spread))

    def within(self, loss: float, theta: float) -> Cost:
        """About the largest θ that is found to cost no more than this, begun at one.

        Raises:
            BudgetError: none is found.
        """
        best: Cost | None = None
        for _ in range(_TRIES):
            found = self.cost(theta)
            if found.loss <= loss and (best is None or found.theta > best.theta):
                best = found
            if best is not None and (best.loss >= _NEAR * loss or found is not best):
                return best
            gain = _AIMED * loss / max(found.loss, 1e-3 * loss)
            theta *= gain ** (1 / _GROWTH)
        if best is None:
            raise BudgetError(
                f"no codes were found whose loss rises by at most {loss:g}",
                way_out='a larger loss=, or coded="lossless"',
            )
        return best
