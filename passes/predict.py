"""Calibrate the prediction of the loss: a few trial plans, measured.

The sum of the curves predicts the rise of the loss to second order, and as if weights, inputs and
gradients were independent. For large compressions both fail, by a factor that changes slowly with
the size of the damage. So a few plans are tried on calibration batches, the dense weights replaced
for one forward pass (the model itself is not touched), and the ratio measured : predicted is
interpolated between them, on logarithmic scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tensorize import tt
from tensorize.budget import Budget
from tensorize.errors import BudgetError
from tensorize.forward import untouched
from tensorize.ir import Batch, RankPlan
from tensorize.passes.allocate import Allocate
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import PreservedLoss, call, outputs_of
from tensorize.passes.spectra import as_matrix

TRIAL_SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)
_NORMAL_90 = 1.645
# What interpolation and data of another draw add to the measured scatter (relative, one sigma).
_MODEL_SPREAD = 0.08
_NO_HELD_OUT_SPREAD = 0.25


@dataclass(frozen=True)
class Trial:
    """One measured plan: the curves' sum, the rise of the loss, its relative standard error."""

    raw: float
    measured: float
    spread: float
    output_error: float


@dataclass(frozen=True)
class Predictor:
    """From the sum of distortions of a plan to the rise of the loss on unseen data."""

    trials: tuple[Trial, ...]
    unit: str
    held_out: bool

    def predict(self, raw: float) -> tuple[float, tuple[float, float]]:
        """(expected rise, its 90 % interval)."""
        if raw <= 0:
            return 0.0, (0.0, 0.0)
        if not self.trials:
            return raw, (0.0, 4 * raw)
        x = math.log(raw)
        known = [math.log(t.raw) for t in self.trials]
        ratios = [math.log(t.measured / t.raw) for t in self.trials]
        ratio = float(np.interp(x, known, ratios))
        spread = float(np.interp(x, known, [t.spread for t in self.trials]))
        # Far from every measured point the ratio is less certain, the more it changes between them.
        slope = (max(ratios) - min(ratios)) / max(known[-1] - known[0], 1.0)
        distance = min(abs(x - k) for k in known)
        drift = 0.5 * distance * abs(slope) + 0.05 * max(known[0] - x, x - known[-1], 0.0)
        base = _MODEL_SPREAD if self.held_out else _NO_HELD_OUT_SPREAD
        sigma = math.sqrt(base**2 + spread**2 + drift**2)
        expected = raw * math.exp(ratio)
        width = math.exp(_NORMAL_90 * sigma)
        return expected, (expected / width, expected * width)

    def inverse(self, loss: float) -> float:
        """The largest sum of distortions whose expected rise is within ``loss``."""
        low, high = 1e-12 * max(loss, 1e-12), 1e6 * max(loss, 1.0)
        for _ in range(200):
            middle = math.sqrt(low * high)
            if self.predict(middle)[0] <= loss:
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
    """Program with ``predictor``, where there is a loss to preserve and data to measure it on."""

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    held_out: bool
    name: str = "predict"

    def run(self, program: Program) -> Program:
        if program.metric != "loss" or self.loss is None:
            return replace(program, summary="no loss to predict: weights and inputs alone")
        if not any(curve.in_nats for curve in program.spectra.values()):
            return replace(program, summary="no loss to predict: its gradients say nothing")
        model = program.model
        with untouched(model):
            dense = [call(model, batch, k) for k, batch in enumerate(self.batches)]
        trials: dict[tuple[RankPlan, ...], Trial] = {}
        for done, share in enumerate(TRIAL_SHARES):
            program.progress("prediction", done, len(TRIAL_SHARES))
            try:
                plan = Allocate(Budget(params=share)).run(program).plan
            except BudgetError:
                continue  # the weights that cannot be factorized take more than this share
            assert plan is not None
            if plan.sites in trials or not sum(site.predicted_loss for site in plan.sites) > 0:
                continue
            trial = self._measure(program, plan.sites, dense)
            if trial.measured > 0:
                trials[plan.sites] = trial
        program.progress("prediction", len(TRIAL_SHARES), len(TRIAL_SHARES))
        ordered = tuple(sorted(trials.values(), key=lambda trial: trial.raw))
        predictor = Predictor(ordered, self.loss.unit, self.held_out)
        ratios = ", ".join(f"{t.measured / t.raw:.2f}" for t in ordered)
        summary = f"measured : predicted {ratios or 'nothing to measure'} ({self.loss.unit})"
        return replace(program, predictor=predictor, summary=summary)

    def _measure(
        self, program: Program, sites: Sequence[RankPlan], dense: Sequence[object]
    ) -> Trial:
        assert self.loss is not None
        model = program.model
        weights = approximations(program, sites)
        rises: list[tuple[float, int]] = []
        error, size = 0.0, 0.0
        with untouched(model):
            for batch, before in zip(self.batches, dense, strict=True):
                after = functional_call(model, weights, batch.args, dict(batch.kwargs))
                rises.append(self.loss.rise(before, after, batch, model))
                for a, b in zip(
                    outputs_of(before, batch, model), outputs_of(after, batch, model), strict=True
                ):
                    centred = a.rows.double() - a.rows.double().mean(0)
                    error += float((a.rows - b.rows).double().square().sum())
                    size += float(centred.square().sum())
        rows = sum(count for _, count in rises)
        measured = sum(total for total, _ in rises) / max(rows, 1)
        means = torch.tensor([total / max(count, 1) for total, count in rises])
        spread = 0.0
        if len(means) > 1 and measured > 0:
            spread = float(means.std() / math.sqrt(len(means)) / measured)
        raw = sum(site.predicted_loss for site in sites)
        return Trial(raw, measured, spread, math.sqrt(error / size) if size > 0 else 0.0)


def approximations(program: Program, sites: Sequence[RankPlan]) -> dict[str, Tensor]:
    """Dense weights as the plan would leave them, by parameter name; tied names included."""
    parameters: dict[str, nn.Parameter] = dict(program.model.named_parameters())
    weights: dict[str, Tensor] = {}
    for choice in sites:
        if choice.spec is None:
            continue
        dense, curve = parameters[choice.name].detach(), program.spectra[choice.name]
        cores = curve.factors(choice.spec, as_matrix(curve.site, dense))
        weight = tt.reconstruct(choice.spec, cores).to(dense.dtype)
        weights[choice.name] = weight.reshape(dense.shape)
    return weights
