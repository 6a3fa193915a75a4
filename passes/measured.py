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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, is_tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tensorize import tt
from tensorize.budget import Budget
from tensorize.errors import BudgetError, CaptureError
from tensorize.forward import untouched
from tensorize.ir import LOW_RANK, Batch, RankPlan, Site, TTSpec
from tensorize.passes.allocate import Allocate
from tensorize.passes.curves import Spectrum
from tensorize.passes.factorize import Cores, best_components, planned_cores
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import (
    Output,
    PreservedLoss,
    call,
    essential,
    of_batch,
    outputs_of,
    samples_of,
)

LARGE = 0.1
"""A weight that holds this share of a model's parameters is measured by itself."""

LEVELS = (0.05, 0.1, 0.35, 0.7)
"""Shares of its parameters at which it is."""

_KEPT_BYTES = 1 << 30

TRIAL = 0.25
"""The share of a model's parameters at which plans with and without that are compared."""


@dataclass(frozen=True)
class Measurement:
    """The rise of the loss a row, its relative standard error, the outputs' relative error."""

    rise: float
    spread: float
    output_error: float


class Reference:
    """The dense model's outputs on some batches: what other weights are measured against.

    They are held where they take no more than a gigabyte, else made again each time.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss: PreservedLoss) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self._kept: dict[int, Any] = {}
        size = 0
        with untouched(model):
            for k, batch in enumerate(batches):
                result = self._run(batch)
                loss.require_finite(result, batch, model)
                size += sum(leaf.nbytes for leaf in pytree.tree_leaves(result) if is_tensor(leaf))
                if k == 0 or size <= _KEPT_BYTES:
                    self._kept[k] = result

    def _run(self, batch: Batch) -> Any:
        """The dense model's outputs; with a loss of the caller's all of them."""
        result = call(self.model, batch)
        return result if self.loss.loss_fn is not None else essential(result)

    def measure(self, weights: Mapping[str, Tensor]) -> Measurement:
        """What the model loses with some weights replaced, by name; itself it is not touched."""
        model, rises = self.model, []
        error, size = 0.0, 0.0
        with untouched(model):
            for k, batch in enumerate(self.batches):
                before = self._kept[k] if k in self._kept else self._run(batch)
                with of_batch(batch):
                    after = functional_call(model, dict(weights), batch.args, dict(batch.kwargs))
                rises.append(self.loss.rise(before, after, batch, model))
                for a, b in self._outputs(before, after, batch):
                    centred = a.rows.double() - a.rows.double().mean(0)
                    error += float((a.rows - b.rows).double().square().sum())
                    size += float(centred.square().sum())
        rise = sum(total for total, _ in rises) / max(sum(count for _, count in rises), 1)
        means = torch.tensor([total / max(count, 1) for total, count in rises])
        spread = 0.0
        if len(means) > 1 and rise > 0:
            spread = float(means.std() / len(means) ** 0.5 / rise)
        return Measurement(rise, spread, (error / size) ** 0.5 if size > 0 else 0.0)

    @property
    def one_row_a_sample(self) -> bool:
        """Whether the outputs have one row for each sample, however many positions it has."""
        return samples_of(self._kept[0], self.model) is not None

    def _outputs(self, before: Any, after: Any, batch: Batch) -> list[tuple[Output, Output]]:
        """The outputs that can be compared: with a loss of the caller's they may be anything."""
        try:
            those = (outputs_of(result, batch, self.model) for result in (before, after))
            pairs = list(zip(*those, strict=True))
        except (CaptureError, ValueError):
            if self.loss.loss_fn is None:
                raise
            return []
        return [(a, b) for a, b in pairs if a.rows.shape == b.rows.shape]


def approximations(
    program: Program, sites: Sequence[RankPlan], cores: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Dense weights as the cores would leave them, by parameter name; tied names included."""
    parameters: dict[str, nn.Parameter] = dict(program.model.named_parameters())
    weights: dict[str, Tensor] = {}
    for choice in sites:
        if choice.spec is not None:
            dense = parameters[choice.name]
            weight = tt.reconstruct(choice.spec, cores[choice.name]).to(dense.dtype)
            weights[choice.name] = weight.detach().reshape(dense.shape)
    return weights


@dataclass(frozen=True)
class MeasureLargest:
    """Program whose largest weights have curves with what they really cost at some ranks.

    It is measured on ``batches``.
    """

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    name: str = "largest"

    def run(self, program: Program) -> Program:
        if program.metric != "loss" or self.loss is None:
            return replace(program, summary="nothing to measure: there is no loss")
        whole = sum(elements for elements, _ in program.sizes.values())
        curves = [c for c in program.spectra.values() if c.site.parameters >= LARGE * whole]
        trials = {curve.site.name: _alone(curve) for curve in curves}
        if not any(trials.values()):
            return replace(program, summary="no weight is large enough to be measured by itself")
        first = Reference(program.model, self.batches[:1], self.loss)
        if not first.one_row_a_sample:
            return replace(program, summary="not measured: every position has an output of its own")
        reference = Reference(program.model, self.batches, self.loss)
        found, done = dict(program.spectra), 0
        ratios: list[str] = []
        for name, choices in trials.items():
            known = best_components(program, [(choice,) for choice in choices])
            pairs: list[tuple[float, float]] = []
            for choice in choices:
                program.progress("largest", done, sum(map(len, trials.values())))
                pairs.append((choice.predicted_loss, _rise(program, [choice], known, reference)))
                done += 1
            found[name] = replace(found[name], measured=tuple(sorted(pairs)))
            ratios.append(f"{name} {', '.join(f'{rise / lost:.2f}' for lost, rise in pairs)}")
        program.progress("largest", done, done)
        measured = replace(program, spectra=found)
        summary = f"measured : predicted alone: {'; '.join(ratios)}"
        if not _is_better(measured, program, reference):
            return replace(program, summary=f"{summary}; not used, as plans with it lose more")
        return replace(measured, summary=summary)


def _is_better(one: Program, other: Program, reference: Reference) -> bool:
    """Whether a trial plan of one program loses less than one of the other."""
    rises = []
    for program in (one, other):
        plan = trial_plan(program, TRIAL)
        if plan is None:
            return False
        rises.append(_rise(program, plan, None, reference))
    return rises[0] < rises[1]


def trial_plan(program: Program, share: float) -> tuple[RankPlan, ...] | None:
    """What a trial at a share of the parameters does; None where it does nothing."""
    try:
        plan = Allocate(Budget(params=share)).run(program).plan
    except BudgetError:
        return None  # the weights that cannot be factorized take more than this share
    assert plan is not None
    return plan.sites if sum(site.predicted_loss for site in plan.sites) > 0 else None


def _rise(
    program: Program,
    sites: Sequence[RankPlan],
    known: Mapping[str, Cores] | None,
    reference: Reference,
) -> float:
    cores = planned_cores(program, sites, known)
    return reference.measure(approximations(program, sites, cores)).rise


def _alone(curve: Spectrum) -> list[RankPlan]:
    """A weight at the ranks of the levels; nothing where low rank is not allowed or possible."""
    site: Site = curve.site
    m, n = site.matrix
    ranks = {max(1, int(level * m * n / (m + n))) for level in LEVELS}
    if not curve.in_nats or LOW_RANK not in curve.formats or min(m, n) <= max(ranks):
        return []
    plans = []
    for rank in sorted(ranks):
        spec = TTSpec.low_rank(m, n, rank, experts=site.experts)
        lost = curve.distortion_of(spec)
        if lost > 0:
            error = curve.error(lost)
            plans.append(RankPlan(site.name, site.kind, site.shape, spec, error, lost, "measured"))
    return plans
