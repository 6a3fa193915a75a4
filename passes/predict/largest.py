"""What compressed weights do to the loss, measured; and curves of the largest weights put right.

A curve is right to second order. The largest weights of a model (its table of tokens) are those of
which a small budget leaves the least, and there the second order does not hold: at a tenth of its
parameters a sentence encoder's table cost 3.3 times what its curve said, while other weights cost
what theirs said, so that it was given far too little. There are few such weights, so each is
compressed alone to some ranks and measured, the others being dense.

That is done where a model has one output row a sample, and kept where a plan with it loses less
than one without. Two decoders got worse by it: there one weight alone costs up to 14 times its
curve, which in a model that is compressed as a whole it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tensorize.base.progress import no_progress
from tensorize.formats.registry import named
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Batch, Site
from tensorize.ir.spec import TTSpec
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.predict.trials import Measuring, Reference, trial_plan
from tensorize.passes.stages import Learned

LARGE = 0.1
"""A weight that holds this share of a model's parameters is measured by itself."""

LEVELS = (0.05, 0.1, 0.35, 0.7)
"""Shares of its parameters at which it is."""


TRIAL = 0.25
"""The share of a model's parameters at which plans with and without that are compared."""


@dataclass(frozen=True)
class MeasureLargest:
    """Gives the largest weights curves with what they really cost at some ranks.

    It is measured on ``batches``; by ``measuring``, where the model is not in memory.
    """

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    measuring: Callable[[], Measuring] | None = None
    name: str = "largest"

    def run(self, learned: Learned) -> Learned:
        if learned.metric != "loss" or (self.loss is None and self.measuring is None):
            return replace(learned, summary="nothing to measure: there is no loss")
        whole = sum(elements for elements, _ in learned.sizes.values())
        curves = [c for c in learned.spectra.values() if c.site.parameters >= LARGE * whole]
        alone = {curve.site.name: _alone(curve) for curve in curves}
        trials = {name: choices for name, choices in alone.items() if choices}
        if not trials:
            return replace(learned, summary="no weight is large enough to be measured by itself")
        reference = self._reference(learned)
        if reference is None:
            return replace(learned, summary="not measured: every position has an output of its own")
        found, quiet = dict(learned.spectra), replace(learned, progress=no_progress)
        ratios: list[str] = []
        for done, (name, choices) in enumerate(trials.items()):
            learned.progress("largest", done, len(trials))
            tried = reference.try_plans(quiet, [[choice] for choice in choices], cut=True)
            pairs = [
                (choice.predicted_loss, lost.rise)
                for choice, lost in zip(choices, tried, strict=True)
            ]
            found[name] = replace(found[name], measured=tuple(sorted(pairs)))
            ratios.append(f"{name} {', '.join(f'{rise / lost:.2f}' for lost, rise in pairs)}")
        learned.progress("largest", len(trials), len(trials))
        measured = replace(learned, spectra=found)
        summary = f"measured : predicted alone: {'; '.join(ratios)}"
        if not _is_better(replace(measured, progress=no_progress), quiet, reference):
            return replace(learned, summary=f"{summary}; not used, as plans with it lose more")
        return replace(measured, summary=summary)

    def _reference(self, learned: Learned) -> Measuring | None:
        """What weights are measured against, where a sample has one output row."""
        if self.measuring is not None:
            reference = self.measuring()
            return reference if reference.one_row_a_sample else None
        assert self.loss is not None
        if not Reference(learned.model, self.batches[:1], self.loss).one_row_a_sample:
            return None
        return Reference(learned.model, self.batches, self.loss)


def _is_better(one: Learned, other: Learned, reference: Measuring) -> bool:
    """Whether a trial plan by one's curves loses less than by the other's."""
    rises = []
    for learned in (one, other):
        planned = trial_plan(learned, TRIAL)
        if planned is None:
            return False
        (lost,) = reference.try_plans(learned, [planned.plan.sites], cut=False)
        rises.append(lost.rise)
    return rises[0] < rises[1]


def _alone(curve: Spectrum) -> list[RankPlan]:
    """A weight at the ranks of the levels; nothing where low rank is not allowed or possible."""
    site: Site = curve.site
    m, n = site.matrix
    ranks = {max(1, int(level * m * n / (m + n))) for level in LEVELS}
    if (
        not curve.in_nats
        or not any(named(f).spectral for f in curve.formats)
        or min(m, n) <= max(ranks)
    ):
        return []
    plans = []
    for rank in sorted(ranks):
        spec = TTSpec.low_rank(m, n, rank, experts=site.experts)
        lost = curve.distortion_of(spec)
        if lost > 0:
            error = curve.error(lost)
            why = "measured"
            plans.append(RankPlan(site.name, site.kind, site.shape, spec, error, lost, why))
    return plans
