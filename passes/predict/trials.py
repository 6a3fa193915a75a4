"""Measure what a model loses with some weights replaced, against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, is_tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import BudgetError, CaptureError
from tensorize.base.tensors import give_back, in_rows
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.capture.observer import StandIns
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
    row_name,
    row_total,
    samples_of,
)
from tensorize.passes.observe.text import TextLoss
from tensorize.passes.predict.metrics import MetricFunction, Value, mean_of, value_of
from tensorize.passes.predict.predictor import NORMAL_90, Predictor, student_90
from tensorize.passes.rewrite.factorize import Cores, best_components, planned_cores, stand_in
from tensorize.passes.stages import Analysed, Dense, Learned, Planned

_KEPT_BYTES = 1 << 28
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


Sites = Sequence[RankPlan]
"""What is done to some weights."""


class Measuring(Protocol):
    """The dense model on some batches, and what other weights lose there."""

    rows: int
    one_row_a_sample: bool
    row: str
    metrics: tuple[Any, ...]

    def try_plans(
        self, learned: Learned, plans: Sequence[Sites], *, cut: bool
    ) -> list[Measurement]:
        """What plans lose, with the factors that curves give.

        ``cut``: those of smaller ranks are cut from those of the largest.
        """
        ...

    def try_nothing(self, learned: Learned) -> Measurement:
        """What the model loses where all weights that may be compressed are zero."""
        ...

    def try_refined(
        self, learned: Learned, sites: Sites, cores: Callable[[], Mapping[str, Cores]]
    ) -> Measurement:
        """What a plan loses with refined factors; ``cores`` makes those of a model in memory."""
        ...

    @property
    def text_loss(self) -> float | None:
        """The dense model's cross-entropy of the batches' text, in nats a token; None: no text."""
        ...


class Reference:
    """The dense model's outputs on some batches: what other weights are measured against.

    Those that take no more than a quarter of a gigabyte are held, others made again each time.
    ``one_row_a_sample``: whether they have one row for each, however many positions it has;
    ``row``: what a row is.
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
        self.rows, self.one_row_a_sample = 0, False
        self._text = TextLoss(model) if loss.unit == NATS else None
        with untouched(model):
            for k, batch in enumerate(batches):
                result = self._outputs_for(k)
                loss.require_finite(result, batch, model)
                if self._text is not None:
                    self._text.add(batch, result)
                if k == 0:
                    self.one_row_a_sample = samples_of(result, model) is not None
                    self.row = row_name(result, batch, model)
                self.rows += row_total(result, batch, model)
                dense.append(self._values(result, batch, result))
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
        (found,) = self.measure_each([weights])
        return found

    def measure_each(self, several: Sequence[Mapping[str, Any]]) -> list[Measurement]:
        """The same, each time with others replaced; the dense model runs once for all of them.

        Then what it gives is not held either: several models' factors take memory of their own.
        """
        model, parameters = self.model, dict(self.model.named_parameters())
        tallies = [Tally() for _ in several]
        instead = [{id(parameters[n]): w for n, w in weights.items()} for weights in several]
        with untouched(model):
            for k, batch in enumerate(self.batches):
                before = self._outputs_for(k, hold=len(several) == 1)
                for tally, tensors in zip(tallies, instead, strict=True):
                    with fitting(model, batch), StandIns(tensors):
                        after = once(model, batch)
                    tally.metrics.append(self._values(after, batch, before))
                    tally.compare(self.loss, before, after, batch, model)
                    del after
                    give_back()
        return [tally.measurement() for tally in tallies]

    def _outputs_for(self, k: int, *, hold: bool = True) -> Any:
        """The dense model's outputs for the k-th batch."""
        if k in self._kept:
            return self._kept[k]
        result = self._run(self.batches[k])
        if not hold:
            return result
        if not self._kept or _size(self._kept) + _size(result) <= _KEPT_BYTES:
            self._kept[k] = result
        return result

    def forget(self) -> None:
        """Hold none of the outputs until they are asked for again."""
        self._kept.clear()
        give_back()

    @property
    def text_loss(self) -> float | None:
        """The dense model's cross-entropy of the batches' text, in nats a token; None: no text."""
        return None if self._text is None else self._text.value

    def try_plans(
        self, learned: Learned, plans: Sequence[Sites], *, cut: bool
    ) -> list[Measurement]:
        """What plans lose; those that are cut are tried in one run of the dense model."""
        learned.progress("prediction", 0, len(plans))
        if cut:
            self.forget()
            known = best_components(learned, plans)
            cores = [planned_cores(learned, sites, known) for sites in plans]
            found = self.measure_each(
                [stand_ins(learned, *each) for each in zip(plans, cores, strict=True)]
            )
        else:
            found = []
            for done, sites in enumerate(plans):
                learned.progress("prediction", done, len(plans))
                self.forget()  # factors take memory of their own
                found.append(self.measure(stand_ins(learned, sites, planned_cores(learned, sites))))
        learned.progress("prediction", len(plans), len(plans))
        return found

    def try_refined(
        self, learned: Learned, sites: Sites, cores: Callable[[], Mapping[str, Cores]]
    ) -> Measurement:
        """What a plan loses with other factors than its own."""
        self.forget()  # to make them takes memory
        return self.measure(stand_ins(learned, sites, cores()))

    def try_nothing(self, learned: Learned) -> Measurement:
        """What the model loses where all weights that may be compressed are zero."""
        parameters = dict(learned.model.named_parameters())
        return self.measure(
            {site.name: torch.zeros_like(parameters[site.name]) for site in learned.free}
        )


def comparable(
    loss: PreservedLoss, before: Any, after: Any, batch: Batch, model: nn.Module
) -> list[tuple[Output, Output]]:
    """The outputs that can be compared: with a loss of the caller's they may be anything."""
    try:
        those = (outputs_of(result, batch, model) for result in (before, after))
        pairs = list(zip(*those, strict=True))
    except (CaptureError, ValueError):
        if loss.loss_fn is None:
            raise
        return []
    return [(a, b) for a, b in pairs if a.rows.shape == b.rows.shape]


class Tally:
    """What was found of one set of weights so far."""

    def __init__(self) -> None:
        self.rises: list[Tensor] = []
        self.metrics: list[list[float]] = []
        self._error = self._size = 0.0

    def compare(
        self, loss: PreservedLoss, before: Any, after: Any, batch: Batch, model: nn.Module
    ) -> None:
        """Add what a model gives for a batch, as it is and with other weights."""
        self.rises.append(loss.rises(before, after, batch, model))
        for a, b in comparable(loss, before, after, batch, model):
            self._add(a.rows, b.rows)

    def _add(self, before: Tensor, after: Tensor) -> None:
        mean = before.mean(0, dtype=torch.float64)
        for one, other in in_rows(before, after):
            self._error += float((one - other).double().square().sum())
            self._size += float((one.double() - mean).square().sum())

    def measurement(self) -> Measurement:
        total, rows = torch.cat(self.rises).sum(0).tolist()
        rise = total / max(rows, 1)
        spread = _spread(self.rises, rise) if rise > 0 else 0.0
        off = (self._error / self._size) ** 0.5 if self._size > 0 else 0.0
        means = tuple(mean_of(values) for values in zip(*self.metrics, strict=True))
        return Measurement(rise, spread, off, means)


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


def stand_ins(
    learned: Dense, sites: Sequence[RankPlan], cores: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """What stands for the dense weights of a plan, by parameter name: it runs as it will.

    Cores are as they are computed; of weights of fewer bits what is held of them.
    """
    parameters: dict[str, nn.Parameter] = dict(learned.model.named_parameters())
    return {
        choice.name: stand_in(choice.made_as, cores[choice.name], parameters[choice.name])
        for choice in sites
        if choice.made_as is not None
    }


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
