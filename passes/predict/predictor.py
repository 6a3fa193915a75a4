"""From the sum of distortions of a plan to the rise of the loss, by what trials measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tensorize.ir.plan import PredictedMetric
from tensorize.ir.sufficiency import Sufficiency
from tensorize.passes.predict.metrics import predicted_metric

NORMAL_90 = 1.645
# What interpolation and data of another draw add to the measured scatter (relative, one sigma).
_MODEL_SPREAD = 0.13
_NO_HELD_OUT_SPREAD = 0.25
# In logarithms: trials that measure nothing but rounding say nothing, and their scatter may be any.
_WIDEST = 20.0
# Relative, for each unit of the logarithm of the damage beyond the last trial of a refinement.
_UNTRIED = 0.12
# What a refinement gains grows with the damage: in logarithms, by at most this share of its growth.
_STEEPEST = 0.5
# And below its trials it fades, by this for each unit of the logarithm of the damage (decoders: at
# 50, 75 and 90 % kept a refit takes 16 to 23, 13 to 16 and 11 to 14 % off the loss).
_FADES = 0.12


# Where nothing was held out, new data lose up to this times what is lost without any weight.
_WORST = 2.0


def student_90(degrees: int) -> float:
    """How many standard deviations hold 90 % of Student's distribution, to some percent.

    Fisher & Cornish, "The percentile points of distributions having known cumulants" (1960).
    """
    z = NORMAL_90
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def interval(rise: float, spread: float) -> tuple[float, float]:
    """Where a rise is expected on unseen data, in nine of ten: it was measured on some held out."""
    width = math.exp(NORMAL_90 * math.hypot(_MODEL_SPREAD, min(spread, _WIDEST)))
    return rise / width, rise * width


@dataclass(frozen=True)
class Trial:
    """One measured plan: the curves' sum, the rise of the loss, its relative standard error.

    ``refine`` is what was done to its factors; ``metrics`` are the caller's own, each as a mean and
    its standard error.
    """

    raw: float
    measured: float
    spread: float
    output_error: float
    refine: str | None = None
    metrics: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Predictor:
    """From the sum of distortions of a plan to the rise of the loss on unseen data."""

    trials: tuple[Trial, ...]
    """Of plans of ranks alone, by their sums."""
    unit: str
    held_out: bool
    refinements: tuple[str, ...] = ()
    """What can be predicted beside factors as they come from the decompositions."""
    without: float | None = None
    """Where nothing was held out: the rise with none of the weights that may be compressed."""
    worth: Mapping[str, float] = field(default_factory=dict)
    """What a distortion of each family of forms counts in sums, beside that of ranks: as much."""
    rounded: tuple[Trial, ...] = ()
    """Of plans in which weights may have fewer bits, by their sums."""
    metrics: tuple[tuple[str, float, float], ...] = ()
    """The caller's own: name, and the dense model's mean and its standard error."""
    batches: int = 0
    """How many these are of."""
    text_loss: float | None = None
    """Of a decoder: the dense model's cross-entropy of the text of the trials, in nats a token."""
    row: str = "row"
    """What a row of the outputs is."""
    images: int = 0
    """How many images the batch holds by which uses were seen; 0 where a row is no image."""
    sufficiency: Sufficiency = field(default_factory=Sufficiency)
    """How far the calibration data suffice."""

    @property
    def with_bits(self) -> Predictor:
        """That of plans in which weights may have fewer bits: by trials of such plans.

        What ranks lose on new data is partly what the calibration data did not show of the inputs;
        rounding keeps all directions, and loses less than that. What a refinement gains where no
        such plan was refined is what it gains of ranks.
        """
        if not self.rounded:
            return self
        found = replace(self, trials=self.rounded, rounded=())
        known = {trial.refine for trial in self.rounded}
        moved = []
        for trial in self.trials:
            if trial.refine not in known:
                gain = self._gain(math.log(trial.raw), trial.refine)
                rise = found.predict(trial.raw)[0] * math.exp(gain)
                moved.append(replace(trial, measured=rise, metrics=()))
        trials = sorted((*self.rounded, *moved), key=lambda trial: trial.raw)
        return replace(found, trials=tuple(trials))

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
        rising = self._rising(x, x + ratio, refine)
        ratio += rising
        spread = float(np.interp(x, known, [t.spread for t in plain]))
        # Far from every measured point the ratio is less certain, the more it changes between them.
        slope = (max(ratios) - min(ratios)) / max(known[-1] - known[0], 1.0)
        distance = min(abs(x - k) for k in known)
        drift = 0.5 * distance * abs(slope) + 0.05 * max(known[0] - x, x - known[-1], 0.0)
        if refine is not None and self._of(refine):
            drift += _UNTRIED * max(x - self._measured(refine)[0][-1], 0.0)
        base = _MODEL_SPREAD if self.held_out else _NO_HELD_OUT_SPREAD
        sigma = math.sqrt(base**2 + spread**2 + drift**2 + rising**2)
        expected = raw * math.exp(ratio)
        width = math.exp(min(NORMAL_90 * sigma, _WIDEST))
        high = expected * width
        if not self.held_out and self.without is not None:
            high = max(high, _WORST * self.without)
        return expected, (expected / width, high)

    def predict_metrics(
        self, loss: float, interval: tuple[float, float]
    ) -> tuple[PredictedMetric, ...]:
        """The caller's metrics where the loss rises so."""
        student = student_90(self.batches - 1) if self.batches > 1 else NORMAL_90
        return tuple(
            predicted_metric(
                name,
                (mean, error),
                [(trial.measured, trial.metrics[k]) for trial in self.trials if trial.metrics],
                loss,
                interval,
                student,
            )
            for k, (name, mean, error) in enumerate(self.metrics)
        )

    def _rising(self, x: float, y: float, refine: str | None) -> float:
        """What brings the logarithm y of a rise at x to a function that never falls.

        Trials scatter: where more damage was measured to lose less, both lose their mean.
        """
        known, rises = self._measured(None)
        places = known
        if refine is not None and self._of(refine):
            places = np.union1d(known, self._measured(refine)[0])
        found = np.array(
            [np.interp(at, known, rises) + self._gain(float(at), refine) for at in places]
        )
        levels = _never_falling(found)
        moved = y + float(np.interp(x, places, levels - found))
        k = int(np.searchsorted(places, x))
        low = levels[k - 1] if k > 0 else -math.inf
        high = levels[k] if k < len(levels) else math.inf
        return min(max(moved, low), high) - y

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


def _never_falling(values: np.ndarray) -> np.ndarray:
    """The closest values that never fall (Ayer et al. 1955): runs that do are their means."""
    runs: list[list[float]] = []  # mean, length
    for value in values:
        runs.append([float(value), 1])
        while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
            (a, n), (b, m) = runs[-2:]
            runs[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.array([mean for mean, length in runs for _ in range(int(length))])
