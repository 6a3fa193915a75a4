"""Calibrate the prediction of the loss: a few trial plans, measured.

The sum of the curves predicts the rise of the loss to second order, and as if weights, inputs and
gradients were independent. For large compressions both fail, by a factor that changes slowly with
the size of the damage. So a few plans are tried on calibration batches, the dense weights replaced
for one forward pass (the model itself is not touched), and the ratio measured : predicted is
interpolated between them, on logarithmic scales. What refining the factors gains is measured in the
same way, at fewer points: it changes slowly with the size of the damage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.ir import POLISH, REFIT, Batch, RankPlan
from tensorize.passes.allocate import smallest_share
from tensorize.passes.factorize import Cores, best_components, compressed_copy, planned_cores
from tensorize.passes.measured import Reference, approximations, trial_plan
from tensorize.passes.pipeline import Program
from tensorize.passes.polish import polish
from tensorize.passes.preserved import PreservedLoss
from tensorize.passes.refit import refit
from tensorize.weight import factored

TRIAL_SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)
# A refit's gain changes slowly from half the parameters on, a polish's does not, and neither does
# that of a model with one output row a sample, where a table is the first to lose: it has no refit.
_REFINED_SHARES = {REFIT: (0.5, 0.25), POLISH: (0.75, 0.5, 0.25)}
_REFINED_POOLED = (0.75, 0.5, 0.25)
_NORMAL_90 = 1.645
# What interpolation and data of another draw add to the measured scatter (relative, one sigma).
_MODEL_SPREAD = 0.13
_NO_HELD_OUT_SPREAD = 0.25
# Relative, for each unit of the logarithm of the damage beyond the last trial of a refinement.
_UNTRIED = 0.12
# What a refinement gains grows with the damage: in logarithms, by at most this share of its growth.
_STEEPEST = 0.5
# And below its trials it fades, by this for each unit of the logarithm of the damage (decoders: at
# 50, 75 and 90 % kept a refit takes 16 to 23, 13 to 16 and 11 to 14 % off the loss).
_FADES = 0.12
# A refinement leaves at least this share of a rise, as far as predictions go.
_NOTHING = 0.01


@dataclass(frozen=True)
class Trial:
    """One measured plan: the curves' sum, the rise of the loss, its relative standard error.

    ``refine`` is what was done to its factors.
    """

    raw: float
    measured: float
    spread: float
    output_error: float
    refine: str | None = None


@dataclass(frozen=True)
class Predictor:
    """From the sum of distortions of a plan to the rise of the loss on unseen data."""

    trials: tuple[Trial, ...]
    unit: str
    held_out: bool
    refinements: tuple[str, ...] = ()
    """What can be predicted beside factors as they come from the decompositions."""

    def _of(self, refine: str | None) -> list[Trial]:
        return [trial for trial in self.trials if trial.refine == refine]

    def _measured(self, refine: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The logarithms of the sums of distortions, and of the rises measured at them."""
        trials = self._of(refine)
        return np.log([t.raw for t in trials]), np.log([t.measured for t in trials])

    def predict(self, raw: float, refine: str | None = None) -> tuple[float, tuple[float, float]]:
        """(expected rise, its 90 % interval)."""
        if raw <= 0:
            return 0.0, (0.0, 0.0)
        plain = self._of(None)
        if not plain:
            return raw, (0.0, 4 * raw)
        x = math.log(raw)
        known, rises = self._measured(None)
        ratios = rises - known
        ratio = float(np.interp(x, known, ratios)) + self._gain(x, refine)
        spread = float(np.interp(x, known, [t.spread for t in plain]))
        # Far from every measured point the ratio is less certain, the more it changes between them.
        slope = (max(ratios) - min(ratios)) / max(known[-1] - known[0], 1.0)
        distance = min(abs(x - k) for k in known)
        drift = 0.5 * distance * abs(slope) + 0.05 * max(known[0] - x, x - known[-1], 0.0)
        if refine is not None and self._of(refine):
            drift += _UNTRIED * max(x - self._measured(refine)[0][-1], 0.0)
        base = _MODEL_SPREAD if self.held_out else _NO_HELD_OUT_SPREAD
        sigma = math.sqrt(base**2 + spread**2 + drift**2)
        expected = raw * math.exp(ratio)
        width = math.exp(_NORMAL_90 * sigma)
        return expected, (expected / width, expected * width)

    def _gain(self, x: float, refine: str | None) -> float:
        """By what a refinement changes the logarithm of the rise, at the logarithm of a sum.

        Beyond its trials it goes on as between the last two, and never past no change; below them
        it fades.
        """
        if refine is None or not self._of(refine) or not self._of(None):
            return 0.0
        at, refined = self._measured(refine)
        gains = refined - np.interp(at, *self._measured(None))
        gain = float(np.interp(x, at, gains))
        if x < at[0]:
            return gain * math.exp(_FADES * (x - at[0]))
        beyond = x - at[-1]
        if beyond <= 0 or len(at) < 2:
            return gain
        slope = (gains[-1] - gains[-2]) / max(at[-1] - at[-2], 1e-9)
        further = gain + beyond * float(np.clip(slope, -_STEEPEST, 0.0))
        return min(further, max(gain, 0.0))

    def pays(self, refine: str) -> bool:
        """Whether a refinement made its trials better than they were, taken together."""
        gains = [self._gain(math.log(trial.raw), refine) for trial in self._of(refine)]
        return not gains or sum(gains) < 0

    def inverse(self, loss: float, refine: str | None = None) -> float:
        """The largest sum of distortions whose expected rise is within ``loss``."""
        low, high = 1e-12 * max(loss, 1e-12), 1e6 * max(loss, 1.0)
        for _ in range(200):
            middle = math.sqrt(low * high)
            if self.predict(middle, refine)[0] <= loss:
                low = middle
            else:
                high = middle
        return low

    def output_error(self, loss: float) -> float:
        """The relative error of the outputs (a norm) that goes with a rise of the loss."""
        if not self.trials or loss <= 0:
            return 0.0
        trials = sorted(self.trials, key=lambda trial: trial.measured)
        known = [math.log(t.measured) for t in trials]
        factors = [t.output_error / math.sqrt(t.measured) for t in trials]
        return float(np.interp(math.log(loss), known, factors)) * math.sqrt(loss)


@dataclass(frozen=True)
class CalibratePrediction:
    """Program with ``predictor``, where there is a loss to preserve and data to measure it on.

    Trial plans are measured on ``held_out`` batches, or on those ``learnt`` from where there are
    none; ``refinements`` are measured as well.
    """

    learnt: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    loss: PreservedLoss | None
    refinements: tuple[str, ...] = ()
    name: str = "predict"

    @property
    def _batches(self) -> tuple[Batch, ...]:
        return self.held_out or self.learnt

    def run(self, program: Program) -> Program:
        if program.metric != "loss" or self.loss is None:
            return replace(program, summary="no loss to predict: weights and inputs alone")
        if not any(curve.in_nats for curve in program.spectra.values()):
            return replace(program, summary="no loss to predict: its gradients say nothing")
        reference = Reference(program.model, self._batches, self.loss)
        least = smallest_share(program)
        plans = {share: trial_plan(program, trial_share(least, share)) for share in TRIAL_SHARES}
        # Of shares that come to one plan the first is tried.
        first = {plan: share for share, plan in reversed(plans.items()) if plan is not None}
        wanted: list[tuple[float, str | None]] = [(share, None) for share in TRIAL_SHARES]
        pooled = reference.one_row_a_sample
        for refine in self.refinements:
            shares = _REFINED_POOLED if pooled else _REFINED_SHARES[refine]
            wanted += [(share, refine) for share in shares]
        known = best_components(program, first)
        trials: list[Trial] = []
        for done, (share, refine) in enumerate(wanted):
            program.progress("prediction", done, len(wanted))
            plan = plans[share]
            if plan is not None and first[plan] == share:
                trials.append(self._measure(program, plan, refine, known, reference))
        program.progress("prediction", len(wanted), len(wanted))
        ordered = tuple(sorted(_positive(trials), key=lambda trial: trial.raw))
        predictor = Predictor(ordered, self.loss.unit, bool(self.held_out), self.refinements)
        ratios = ", ".join(f"{t.measured / t.raw:.2f}" for t in ordered if t.refine is None)
        summary = f"measured : predicted {ratios or 'nothing to measure'} ({self.loss.unit})"
        return replace(program, predictor=predictor, summary=summary)

    def _measure(
        self,
        program: Program,
        sites: Sequence[RankPlan],
        refine: str | None,
        known: Mapping[str, Cores],
        reference: Reference,
    ) -> Trial:
        assert self.loss is not None
        if refine is None:
            cores = planned_cores(program, sites, known)
        else:
            cores = refit(program, sites, self.learnt)
        if refine == POLISH:
            small = compressed_copy(program, sites, cores)
            polish(small, program.model, self.learnt, self._batches, self.loss)
            cores = {name: weight.cores for name, weight in factored(small)}
        found = reference.measure(approximations(program, sites, cores))
        raw = sum(site.predicted_loss for site in sites)
        return Trial(raw, found.rise, found.spread, found.output_error, refine)


def trial_share(least: float, share: float) -> float:
    """A share of a trial; where no model is so small, that of what can be saved at all."""
    return share if share > least else least + (1 - least) * share


def _positive(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trials whose rise can be predicted from: those that are worse than the dense model.

    Refined factors may be better than it, by a loss of the caller's: then almost nothing is lost.
    """
    plain = {t.raw: t.measured for t in trials if t.refine is None}
    for trial in trials:
        least = 0.0 if trial.refine is None else _NOTHING * plain.get(trial.raw, 0.0)
        if max(trial.measured, least) > 0:
            yield replace(trial, measured=max(trial.measured, least))
