"""The loss to preserve: how far a model's outputs are from the dense model's own.

By default it is measured on the outputs themselves, as a mean over output rows (tokens): the KL
divergence in nats where the output has ``.logits`` of several classes, or where its rows are
distributions (``distributions.py``), else the squared error relative to the outputs' variance. A
caller's ``loss_fn`` replaces it, and ``"logits"`` or ``"squared"`` says which of the two it is.
Rows that the attention mask hides, and rows whose label is -100, count in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tensorize.base.errors import AnalysisError, ModelError
from tensorize.base.tensors import in_rows
from tensorize.capture.forward import once, untouched
from tensorize.ir.plan import NATS, OF_VARIANCE, THE_CALLERS
from tensorize.ir.sites import Batch
from tensorize.passes.observe.distributions import (
    WORDS,
    Looks,
    Reading,
    as_read,
    has_classes,
    parametrised,
)
from tensorize.passes.observe.outputs import Output, call, outputs_of, row_total

LossFunction = Callable[[Any, Any], Tensor]
T = TypeVar("T")
LOGITS: Literal["logits"] = "logits"
SQUARED: Literal["squared"] = "squared"
LossOption = LossFunction | Literal["logits", "squared"] | None
"""What ``loss_fn=`` may be."""


def function_of(option: LossOption) -> LossFunction | None:
    """The caller's own function, where ``loss_fn=`` is one."""
    return option if callable(option) else None


def check_loss(option: Any) -> LossOption:
    """What ``loss_fn=`` is; raises AnalysisError for what is neither a function nor a name."""
    if callable(option) or option in (LOGITS, SQUARED):
        chosen: Any = option
        return chosen
    raise AnalysisError(
        f"loss_fn={option!r} is no function",
        way_out='a function (outputs, batch) -> scalar, "logits" or "squared"',
    )


def split(batches: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Batches to learn from, and those held out: a quarter, of fewer than four every second.

    They are two runs, each in the middle of a half: what follows on each other is often of one
    document, and the first or last may be the shortest or longest.
    """
    count = len(batches)
    if count < 4:
        return batches[::2], batches[1::2]
    out = count // 4
    runs = ((count, out),) if out < 2 else ((count // 2, (out + 1) // 2), (count, out // 2))
    held, start = set[int](), 0
    for end, size in runs:
        first = (start + end - size + 1) // 2
        held.update(range(first, first + size))
        start = end
    return (
        tuple(b for k, b in enumerate(batches) if k not in held),
        tuple(b for k, b in enumerate(batches) if k in held),
    )


# ------------------------------------------------------------------------------------ the loss


class _Sums:
    """Sums over the rows of an output, and the variance of a row that follows from them."""

    def __init__(self) -> None:
        self.rows, self.entries, self.squares = 0, 0, 0.0
        self.totals: dict[int, Tensor | float] = {}

    def add(self, rows: Tensor) -> None:
        count, width = rows.shape
        self.rows, self.entries = self.rows + count, self.entries + count * width
        self.squares += float(rows.square().sum())
        self.totals[width] = self.totals.get(width, 0.0) + rows.sum(0)

    @property
    def variance(self) -> float:
        count = max(self.rows, 1)
        totals = [torch.as_tensor(total) for total in self.totals.values()]
        if len(totals) == 1:
            of_mean = float((totals[0] / count).square().sum())
        else:  # rows of several widths have one mean entry in common
            of_mean = sum(float(t.sum()) for t in totals) ** 2 / max(self.entries, 1) / count
        mean_square = self.squares / count
        # One row, or constant outputs, have no variance to compare with: their size serves.
        variance = mean_square - of_mean
        return variance if variance > 1e-6 * mean_square else mean_square


@dataclass(frozen=True)
class PreservedLoss:
    """The distance to the dense model's outputs, or the caller's loss.

    ``variances`` holds the variance of every output of the dense model, summed over its width;
    ``readings`` says how outputs are read that are not what their names say, and ``note`` tells it.
    """

    loss_fn: LossFunction | None
    variances: Mapping[str, float]
    unit: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    note: str | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_fn: LossOption,
        run: Callable[[nn.Module, Batch], Any] = call,
    ) -> PreservedLoss:
        """Learn the outputs' variance from one pass over the calibration data, and what they are.

        What ``run`` gives for a batch are the outputs; by default, the model's own.

        Raises:
            AnalysisError: an output has no rows that could be logits, which it is said to be.
        """
        if callable(loss_fn):
            return cls(loss_fn, {}, THE_CALLERS)
        sums: dict[str, _Sums] = {}
        looks: dict[str, Looks] = {}
        distribution: str | None = None
        with untouched(model):
            for batch in batches:
                result = run(model, batch)
                distribution = distribution or parametrised(result, model)
                for output in outputs_of(result, batch, model):
                    if loss_fn == LOGITS:
                        _require_several(output)
                        looks.setdefault(output.name, Looks({LOGITS}))
                        continue
                    if output.logits and loss_fn != SQUARED:
                        _require_finite(output, batch)
                        return cls(None, {}, NATS)
                    seen = looks.setdefault(output.name, Looks())
                    seen.classes = seen.classes and has_classes(output, batch)
                    for (rows,) in in_rows(output.rows):
                        seen.add(rows)
                    _require_finite(replace(output, logits=seen.reading == LOGITS), batch)
                    for (rows,) in in_rows(output.rows):
                        sums.setdefault(output.name, _Sums()).add(rows.double())
        variances = {name: found.variance for name, found in sums.items()}
        if loss_fn == SQUARED:
            return cls(None, variances, OF_VARIANCE, dict.fromkeys(sums, SQUARED))
        found: dict[str, Reading | None] = {name: seen.reading for name, seen in looks.items()}
        known: dict[str, Reading] = {
            name: reading for name, reading in found.items() if reading is not None
        }
        if known and len(known) == len(found):
            said = None if loss_fn == LOGITS else _recognised(known)
            return cls(None, {}, NATS, known, said)
        note = _mixed(known) if known else None
        if distribution is not None:
            note = _of_parameters(distribution)
        elif not known:
            note = _of_classes([name for name, seen in looks.items() if seen.classes])
        return cls(None, variances, OF_VARIANCE, note=note)

    def outputs(self, result: Any, batch: Batch, model: nn.Module) -> list[Output]:
        """The outputs to preserve, read as what they are."""
        found = outputs_of(result, batch, model)
        return [as_read(output, self.readings.get(output.name)) for output in found]

    def probe(
        self, result: Any, batch: Batch, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """A scalar whose gradient g is one sample with E[g gᵀ] = rows x the Hessian, and rows.

        For logits: the log-likelihood of labels drawn from the model's own prediction (the true
        Fisher). For other outputs: Gaussian probes scaled by the variance (Gauss-Newton).
        """
        if self.loss_fn is not None:
            rows = row_total(result, batch, model)
            # The mean's gradient is 1/rows of each row's: scaled so that the rule above holds.
            return self._of_the_caller(result, batch) * rows, rows
        outputs = self.outputs(result, batch, model)
        total = outputs[0].rows.new_zeros((), dtype=torch.float32)
        for output in outputs:
            _require_finite(output, batch)
            rows = output.rows.float()
            # Every output is a mean over its own rows: bring them to the first one's count.
            share = math.sqrt(outputs[0].rows.shape[0] / max(rows.shape[0], 1))
            if output.logits:
                total = total + share * _likelihood(rows, generator)
            else:
                noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(
                    rows.device
                )
                scale = math.sqrt(2.0 / max(self.variances[output.name], 1e-30))
                total = total + share * scale * (noise * rows).sum()
        return total, outputs[0].rows.shape[0]

    def require_finite(self, result: Any, batch: Batch, model: nn.Module) -> None:
        """Raises ModelError where the dense model's outputs are no numbers to preserve."""
        if self.loss_fn is None:
            for output in self.outputs(result, batch, model):
                _require_finite(output, batch)

    def _of_the_caller(self, result: Any, batch: Batch) -> Tensor:
        assert self.loss_fn is not None
        return of_the_caller(self.loss_fn, result, batch)

    def distance(
        self, dense: Any, result: Any, batch: Batch, model: nn.Module
    ) -> tuple[Tensor, int]:
        """The rise of the loss on one batch, differentiable, as (sum over rows, rows)."""
        if self.loss_fn is not None:
            rows = row_total(result, batch, model)
            rise = self._of_the_caller(result, batch) - self._of_the_caller(dense, batch)
            return rise * rows, rows
        before, after = (self.outputs(each, batch, model) for each in (dense, result))
        self._require_alike(before, after, batch)
        count = before[0].rows.shape[0]
        total = before[0].rows.new_zeros((), dtype=torch.float64)
        for a, b in zip(before, after, strict=True):
            share = count / max(a.rows.shape[0], 1)
            if a.logits:
                total = total + share * divergence(a.rows, b.rows)
            else:
                error = (a.rows - b.rows).double().square().sum()
                total = total + share * error / max(self.variances[a.name], 1e-30)
        return total, count

    @staticmethod
    def _require_alike(before: list[Output], after: list[Output], batch: Batch) -> None:
        both = "let both return the same, in training mode as well, or pass loss_fn="
        if len(before) != len(after):
            raise ModelError(
                f"one model gives {len(before)} outputs for batch {batch.number}, the other "
                f"{len(after)}",
                way_out=both,
            )
        for a, b in zip(before, after, strict=True):
            if a.rows.shape != b.rows.shape:
                shapes = [tuple(output.rows.shape) for output in (a, b)]
                raise ModelError(
                    f"one model gives {shapes[0]} rows and entries of {a.name} for batch "
                    f"{batch.number}, the other {shapes[1]}",
                    way_out=both,
                )

    def rises(self, dense: Any, result: Any, batch: Batch, model: nn.Module) -> Tensor:
        """The rise of the loss on one batch by sample: (samples, 2), sums over rows, and rows.

        With a loss of the caller's the batch is one.
        """
        if self.loss_fn is not None:
            total, rows = self.rise(dense, result, batch, model)
            return torch.tensor([[total, rows]], dtype=torch.float64)
        before, after = (self.outputs(each, batch, model) for each in (dense, result))
        self._require_alike(before, after, batch)
        count = before[0].rows.shape[0]
        found = torch.zeros(before[0].samples, 2, dtype=torch.float64)
        found[:, 1].index_add_(0, before[0].sample, torch.ones(count, dtype=torch.float64))
        for a, b in zip(before, after, strict=True):
            share = count / max(a.rows.shape[0], 1)
            if a.logits:
                lost = row_divergence(a.rows, b.rows).double()
            else:
                error = (a.rows - b.rows).double().square().sum(-1)
                lost = error / max(self.variances[a.name], 1e-30)
            if a.samples != len(found):  # its rows are of other samples: they tell of the mean
                found[:, 0] += share * float(lost.sum()) / len(found)
            else:
                found[:, 0].index_add_(0, a.sample, share * lost.cpu())
        return found

    def rise(self, dense: Any, result: Any, batch: Batch, model: nn.Module) -> tuple[float, int]:
        """The rise of the loss on one batch as (sum over rows, rows)."""
        with torch.no_grad():
            total, rows = self.distance(dense, result, batch, model)
        return float(total), rows

    def mean_distance(self, model: nn.Module, dense: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean rise of the loss a row, over batches that both models are run on."""
        total, rows = self.total_distance(model, dense, batches)
        return total / max(rows, 1)

    def total_distance(
        self, model: nn.Module, dense: nn.Module, batches: Sequence[Batch]
    ) -> tuple[float, int]:
        """The rise of the loss over batches that both models are run on: its sum, and rows."""
        total, rows = 0.0, 0
        for batch in batches:
            # In a compressed model factors run as well: what it raises is not told as its own.
            wanted, got = call(dense, batch), once(model, batch)
            part, count = self.rise(wanted, got, batch, model)
            total, rows = total + part, rows + count
        return total, rows


def of_the_caller(loss_fn: LossFunction, result: Any, batch: Batch) -> Tensor:
    """What ``loss_fn`` gives for a batch: a tensor of no dimensions."""
    loss = loss_fn(result, batch.given)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise AnalysisError(
            f"loss_fn gave {given} for batch {batch.number}, which is no scalar tensor",
            way_out="return a tensor of one entry that depends on the outputs, such as a mean",
        )
    return loss.reshape(())


def _require_several(output: Output) -> None:
    if output.rows.shape[-1] < 2:
        raise AnalysisError(
            f"{output.name} has one entry a row, which is no distribution",
            way_out='loss_fn="squared", or a function (outputs, batch) -> scalar',
        )


def _recognised(readings: Mapping[str, Reading]) -> str:
    """That outputs are distributions, and how to have them taken as numbers."""
    words = "; ".join(f"{name} holds {WORDS[reading]}" for name, reading in readings.items())
    return f'{words}: compared by KL divergence, in nats; loss_fn="squared" compares the numbers'


def _mixed(readings: Mapping[str, Reading]) -> str:
    """That some outputs are distributions, and are compared as numbers, as the others."""
    words = "; ".join(f"{name} holds {WORDS[reading]}" for name, reading in readings.items())
    return (
        f"{words}, and other outputs do not: all are compared as numbers, by squared errors; pass "
        "loss_fn=, a function (outputs, batch) -> scalar, where it should not be so"
    )


def _of_parameters(distribution: str) -> str:
    """That outputs are parameters of a distribution, and are compared as numbers."""
    return (
        f"the outputs are parameters of a distribution ({distribution}), and each is compared as a "
        "number, by squared errors: pass loss_fn=, a function (outputs, batch) -> scalar as the "
        'negative log-likelihood of what was observed, or loss_fn="squared" if that is meant'
    )


def _of_classes(names: Sequence[str]) -> str | None:
    """That outputs may be logits of the classes that stand in the data."""
    if not names:
        return None
    return (
        f"the batches hold a class for every row of {', '.join(names)}, which is compared as "
        'numbers, by squared errors: loss_fn="logits" compares the chances of the classes, '
        'loss_fn="squared" says that there are none'
    )


def _require_finite(output: Output, batch: Batch) -> None:
    # A chance of zero is a logit of minus infinity.
    values = output.rows.amax(-1) if output.logits else output.rows
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"the dense model's {output.name} for batch {batch.number} is not finite",
            way_out="leave that batch out, or run the model in a wider dtype",
        )


def _likelihood(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A scalar with the gradient of −log p of labels drawn from the prediction of rows of logits.

    That gradient is the chances, less one at the label. With it at hand nothing as large as the
    logits is kept for the backward pass but itself.
    """
    chances = rows.detach().softmax(-1)
    drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(rows.device)
    gradient = chances.scatter_add_(1, drawn, chances.new_full(drawn.shape, -1.0))
    return torch.dot(rows.flatten(), gradient.flatten())


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL of the prediction to the dense model's, in nats, its sum over rows of logits (…, V)."""
    each = in_rows(dense.flatten(0, -2), logits.flatten(0, -2))
    return torch.stack([_terms(*part).sum(dtype=torch.float64) for part in each]).sum()


def row_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL of the prediction to the dense model's, in nats, of every row of logits (rows, V)."""
    return torch.cat([_terms(*part).sum(-1) for part in in_rows(dense, logits)])


def _terms(dense: Tensor, logits: Tensor) -> Tensor:
    p, q = dense.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)  # chance 0: no loss
