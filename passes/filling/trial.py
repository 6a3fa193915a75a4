"""What codes cost on data that they were not chosen for.

Those that are written are chosen on all data there are, so none is left to judge them by. Others,
of the same steps, are chosen on a part, and measured on the rest, which tells how much more codes
cost where they were not chosen: what is fitted to n samples costs about c/n less on them than it
would if they were infinitely many, and c/n more on others (Akaike, "Fitting autoregressive models
for prediction", 1969).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tensorize.base.errors import BudgetError
from tensorize.passes.filling.coder import Filled, coded
from tensorize.passes.filling.fill import Filling
from tensorize.passes.filling.refit import Refit
from tensorize.passes.observe.loss import LossOption, PreservedLoss, split
from tensorize.passes.predict.predictor import interval
from tensorize.passes.predict.trials import Measurement, Reference

_NEAR = 0.93
"""Of a limit on the loss: what is near enough to it."""

_AIMED = 0.97

_TRIES = 6

_GROWTH = 1.1
"""How the loss grows with θ: by this power."""


@dataclass(frozen=True)
class Cost:
    """The rise of the loss of a model whose weights are coded, and its 90 % interval."""

    loss: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Trial:
    """Data in two parts: codes chosen on the ``learnt`` one are measured on what is held out."""

    filling: Filling
    refit: Refit
    learnt: Reference
    held_out: Reference

    @classmethod
    def of(cls, filling: Filling, loss_fn: LossOption) -> Trial | None:
        """On a refit's data; None: there are none, or too few to be held out."""
        if filling.refit is None:
            return None
        model, batches = filling.refit.model, tuple(filling.refit.batches)
        learnt, held_out = split(batches)
        if not held_out:
            return None
        loss = PreservedLoss.fit(model, batches, loss_fn)
        parts = (Reference(model, part, loss) for part in (learnt, held_out))
        return cls(filling, filling.refit.on(learnt), *parts)

    def cost(self, made: Filled) -> Cost:
        """What is found of codes that were chosen on all of the data."""
        written = made.numbers
        learnt, seen = (self._rise(part, written) for part in (self.learnt, self.held_out))
        del written
        part = self.refit.codes(self.filling.weights, made.expected.theta)
        unseen = self._rise(self.held_out, {key: each.numbers for key, each in part.items()})
        rows = self.learnt.rows + self.held_out.rows
        share = self.learnt.rows / rows
        rise = share * learnt.rise + (1 - share) * seen.rise
        # From c/(share · n) + c/n, which was measured, to 2 c/n.
        excess = (unseen.rise - seen.rise) * 2 * share / (1 + share)
        if rise > 0 and seen.rise > 0:  # what is held out may be harder or easier than the rest
            excess *= rise / seen.rise
        loss = rise + max(excess, 0.0)
        return Cost(loss, interval(loss, unseen.spread))

    def within(self, loss: float, theta: float) -> tuple[Filled, Cost]:
        """Codes of about the largest θ that is found to cost no more than this, begun at one.

        Raises:
            BudgetError: none is found.
        """
        best: tuple[Filled, Cost] | None = None
        for _ in range(_TRIES):
            made = coded(self.filling, self.filling.expected(theta))
            cost = self.cost(made)
            better = best is None or theta > best[0].expected.theta
            if cost.loss <= loss and better:
                best = made, cost
            if best is not None and (best[1].loss >= _NEAR * loss or best[0] is not made):
                return best
            gain = _AIMED * loss / max(cost.loss, 1e-3 * loss)
            theta *= gain ** (1 / _GROWTH)
        if best is None:
            raise BudgetError(
                f"no codes were found whose loss rises by at most {loss:g}",
                way_out='a larger loss=, or coded="lossless"',
            )
        return best

    def _rise(self, reference: Reference, numbers: Mapping[int, Tensor]) -> Measurement:
        """What the model loses with other numbers for tensors, by their ids."""
        return reference.measure(
            {
                name: numbers[id(p)].reshape(p.shape).to(p)
                for name, p in self.refit.model.named_parameters()
                if id(p) in numbers
            }
        )
