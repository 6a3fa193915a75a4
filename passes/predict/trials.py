"""Measure what a model loses with some weights replaced, against the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import BudgetError, CaptureError
from tensorize.base.tensors import give_back, in_rows
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.capture.matmul import Frame
from tensorize.capture.observer import StandIns
from tensorize.formats.registry import format_of
from tensorize.ir.budget import Budget
from tensorize.ir.plan import NATS, RankPlan
from tensorize.ir.sites import Batch
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import (
    Output,
    call,
    essential,
    outputs_of,
    row_total,
    samples_of,
)
from tensorize.passes.observe.text import text_loss
from tensorize.passes.predict.metrics import MetricFunction, Value, mean_of, value_of
from tensorize.passes.predict.predictor import NORMAL_90, Predictor, student_90
from tensorize.passes.rewrite.factorize import stand_in
from tensorize.passes.stages import Analysed, Learned, Planned

_KEPT_BYTES = 1 << 30
# Of the rises of single rows: their standard deviation, relative to their mean.
_ROW_SPREAD = 1.3


@dataclass(frozen=True)
class Measurement:
    """The rise of the loss a row, its relative standard error, the outputs' relative error; the
    caller's own metrics."""

    rise: float
    spread: float
    output_error: float
    metrics: tuple[Value, ...] = ()


class Reference:
    """The dense model's outputs on some batches: what other weights are measured against.

    They are held where they take no more than a gigabyte, else made again each time.
    ``one_row_a_sample``: whether they have one row for each, however many positions it has.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss: PreservedLoss,
        metrics: Mapping[str, MetricFunction] | None = None,
    ) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self._functions = metrics or {}
        dense: list[list[float]] = []
        self._kept: dict[int, Any] = {}
        self.rows = 0
        with untouched(model):
            for k, batch in enumerate(batches):
                result = self._outputs_for(k)
                loss.require_finite(result, batch, model)
                self.rows += row_total(result, batch, model)
                dense.append(self._values(result, batch, result))
            self.one_row_a_sample = samples_of(self._outputs_for(0), model) is not None
        means = (mean_of(values) for values in zip(*dense, strict=True))
        self.metrics = tuple((n, *mean) for n, mean in zip(self._functions, means, strict=True))

    def _values(self, outputs: Any, batch: Batch, dense: Any) -> list[float]:
        """The caller's metrics of one batch."""
        each = self._functions.items()
        return [value_of(name, function, outputs, batch, dense) for name, function in each]

    def _run(self, batch: Batch) -> Any:
        """The dense model's outputs; with a loss or metrics of the caller's all of them."""
        result = call(self.model, batch)
        own = self.loss.loss_fn is not None or self._functions
        return result if own else essential(result)

    def measure(self, weights: Mapping[str, Any]) -> Measurement:
        """What the model loses with some weights replaced, by name, in this thread alone."""
        model, rises = self.model, list[Tensor]()
        parameters = dict(model.named_parameters())
        instead = {id(parameters[name]): weight for name, weight in weights.items()}
        error, size = 0.0, 0.0
        metrics: list[list[float]] = []
        with untouched(model):
            for k, batch in enumerate(self.batches):
                before = self._outputs_for(k)
                with fitting(model, batch), StandIns(instead):
                    after = once(model, batch)
                rises.append(self.loss.rises(before, after, batch, model))
                metrics.append(self._values(after, batch, before))
                for a, b in self._outputs(before, after, batch):
                    mean = a.rows.mean(0, dtype=torch.float64)
                    for one, other in in_rows(a.rows, b.rows):
                        error += float((one - other).double().square().sum())
                        size += float((one.double() - mean).square().sum())
                del after
                give_back()
        total, rows = torch.cat(rises).sum(0).tolist()
        rise = total / max(rows, 1)
        spread = _spread(rises, rise) if rise > 0 else 0.0
        off = (error / size) ** 0.5 if size > 0 else 0.0
        means = tuple(mean_of(values) for values in zip(*metrics, strict=True))
        return Measurement(rise, spread, off, means)

    def _outputs_for(self, k: int) -> Any:
        """The dense model's outputs for the k-th batch."""
        if k in self._kept:
            return self._kept[k]
        result = self._run(self.batches[k])
        if not self._kept or _size(self._kept) + _size(result) <= _KEPT_BYTES:
            self._kept[k] = result
        return result

    def forget(self) -> None:
        """Hold none of the outputs until they are asked for again."""
        self._kept.clear()
        give_back()

    def text_loss(self) -> float | None:
        """The dense model's cross-entropy of the batches' text, in nats a token; None: no text."""
        if self.loss.unit != NATS:
            return None
        with untouched(self.model):
            return text_loss(self.model, self.batches, self._outputs_for)

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


def _size(outputs: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(outputs) if is_tensor(leaf))


def _spread(rises: Sequence[Tensor], rise: float) -> float:
    """The relative standard error of a mean rise, by what batches and samples lost each.

    With few of them that is itself not well known: it is as much wider as Student's distribution
    is than the normal one. Where there is one, single rows tell.
    """
    samples = torch.cat(list(rises))
    samples = samples[samples[:, 1] > 0]
    count, rows = len(samples), float(samples[:, 1].sum())
    found = [_ROW_SPREAD / max(rows, 1.0) ** 0.5] if count < 2 else []
    if count > 1:
        errors = samples[:, 0] - rise * samples[:, 1]
        variance = float(errors.square().sum()) * count / (count - 1)
        found.append(student_90(count - 1) / NORMAL_90 * variance**0.5 / rows / rise)
    if len(rises) > 1:
        means = torch.stack([part[:, 0].sum() / part[:, 1].sum().clamp(min=1) for part in rises])
        found.append(float(means.std() / len(means) ** 0.5 / rise))
    return max(found)


def approximations(
    learned: Learned, sites: Sequence[RankPlan], cores: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Dense weights as the cores would leave them, by parameter name; tied names included.

    Cores are plain ones, but for weights of fewer bits: of these what is held, and they run as they
    will, which may round their inputs.
    """
    parameters: dict[str, nn.Parameter] = dict(learned.model.named_parameters())
    weights: dict[str, Any] = {}
    for choice in sites:
        if choice.spec is not None and choice.spec.precision is not None:
            dense = parameters[choice.name]
            weights[choice.name] = stand_in(choice.spec, cores[choice.name], dense)
        elif choice.spec is not None:
            dense, spec = parameters[choice.name], choice.spec.plain
            weight = format_of(spec).reconstruct(spec, cores[choice.name]).to(dense.dtype)
            frame = Frame.of(tuple(dense.shape), spec.shape)
            weights[choice.name] = frame.shaped(weight.detach())
    return weights


def trial_plan(learned: Learned, share: float) -> Planned | None:
    """What a trial at a share of the parameters does; None where it loses nothing."""
    try:
        planned = Allocate(Budget(params=share)).run(untried(learned))
    except BudgetError:
        return None  # the weights that cannot be factorized take more than this share
    return planned if sum(site.predicted_loss for site in planned.plan.sites) > 0 else None


def losing(
    learned: Learned, lost: float, worth: Mapping[str, float], **options: Any
) -> Planned | None:
    """What takes the fewest bytes of what loses so much by the curves; None where nothing does.

    ``options`` are those of ``Allocate``.
    """
    as_summed = Predictor((), "", held_out=False, worth=worth)
    try:
        analysed = learned.to(Analysed, predictor=as_summed)
        planned = Allocate(Budget(loss=lost), **options).run(analysed)
    except BudgetError:
        return None  # whatever may be chosen loses more
    return planned if sum(site.predicted_loss for site in planned.plan.sites) > 0 else None


def untried(learned: Learned) -> Analysed:
    """What plans can be made of before anything was measured."""
    return learned.to(Analysed, predictor=None)
