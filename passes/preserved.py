"""The loss to preserve: how far a model's outputs are from the dense model's own.

By default it is measured on the outputs themselves, as a mean over output rows (tokens): the KL
divergence in nats where the output has ``.logits`` of several classes, else the squared error
relative to the outputs' variance. A caller's ``loss_fn`` replaces it. Rows that the attention mask
hides, and rows whose label is -100, count in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.errors import AnalysisError, CaptureError, ModelError
from tensorize.forward import of_the_model, untouched
from tensorize.ir import Batch

LossFunction = Callable[[Any, Any], Tensor]

LOGITS = "logits"
# Outputs that are by-products: caches, and copies of what other outputs already hold.
_BY_PRODUCTS = ("loss", "past_key_values", "hidden_states", "attentions", "cache", "router")


@dataclass(frozen=True)
class Output:
    """One tensor to preserve, its counted rows (R, width), and whether it holds logits.

    ``shape`` is the tensor's own, ``counted`` a mask over all of its rows (None: all count).
    """

    rows: Tensor
    logits: bool
    name: str
    shape: tuple[int, ...]
    counted: Tensor | None

    @property
    def places(self) -> Tensor:
        """The positions of the counted rows among all rows, on the CPU."""
        if self.counted is None:
            return torch.arange(len(self.rows))
        return self.counted.nonzero()[:, 0].cpu()


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch of the caller's data.

    Raises:
        ModelError: the batch does not fit the model's forward; it says which batch.
    """
    with of_batch(batch):
        return model(*batch.args, **batch.kwargs)


def of_batch(batch: Batch) -> AbstractContextManager[None]:
    """``of_the_model`` for a run on a batch of the caller's data."""
    return of_the_model(
        f"batch {batch.number} does not fit the model's forward",
        "a batch is a tensor, a tuple of positional or a dict of keyword arguments",
    )


def outputs_of(result: Any, batch: Batch, model: nn.Module) -> list[Output]:
    """The tensors to preserve among a model's outputs, with only the rows that count."""
    chosen = _preserved_tensors(result)
    if not chosen:
        raise ModelError(
            f"the model's output ({type(result).__name__}) holds no floating-point tensor that has "
            "rows",
            way_out="pass loss_fn=, a function (outputs, batch) -> scalar",
        )
    found = []
    for name, tensor in chosen:
        entries = _by_rows(name, tensor, model)
        flat = entries.reshape(-1, entries.shape[-1])
        counted = _counted_rows(entries, batch, model)
        rows = flat if counted is None else flat[counted]
        logits = name == LOGITS and flat.shape[-1] > 1  # a single one is a score, no chance
        found.append(Output(rows, logits, name, tuple(entries.shape), counted))
    return found


def essential(result: Any) -> Any:
    """Of a model's outputs what is to be preserved: no cache of keys and values."""
    return dict(_preserved_tensors(result))


def samples_of(result: Any, model: nn.Module) -> int | None:
    """The number of samples of a batch, where every output has one row for each of them."""
    leads = [
        _by_rows(name, tensor, model).shape[:-1] for name, tensor in _preserved_tensors(result)
    ]
    counts = {lead[0] if lead else 1 for lead in leads}
    pooled = all(math.prod(lead[1:]) <= 1 for lead in leads)
    return counts.pop() if pooled and len(counts) == 1 else None


def _by_rows(name: str, tensor: Tensor, model: nn.Module) -> Tensor:
    """An output with its rows' entries along the last axis.

    Classes of pixels come as (B, classes, H, W) in transformers, and scores of positions, of where
    an answer starts, as (B, T).
    """
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if name == LOGITS and tensor.dim() == 4 and tensor.shape[1] == classes != tensor.shape[3]:
        return tensor.movedim(1, -1)
    if name != LOGITS and name.endswith(LOGITS) and tensor.dim() == 2:
        return tensor.unsqueeze(-1)
    return tensor


def _preserved_tensors(result: Any) -> list[tuple[str, Tensor]]:
    """The logits of a model's outputs; where there are none, all that could count."""
    named = [(name, t) for name, t in _named_tensors(result) if _has_rows(t)]
    return [(name, t) for name, t in named if name == LOGITS] or named


def _has_rows(tensor: Tensor) -> bool:
    """Whether its rows can be compared: none of sparse, nested or empty ones can."""
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested
    return plain and 0 not in tensor.shape[-1:]


def _named_tensors(result: Any) -> list[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        return [("output", result)]
    if isinstance(result, Mapping):
        items = list(result.items())
    elif is_dataclass(result):
        items = [(f.name, getattr(result, f.name)) for f in dataclass_fields(result)]
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        items = [(name, getattr(result, name)) for name in getattr(result, "_fields")]  # noqa: B009
    elif isinstance(result, Sequence):
        items = [(f"output {k}", value) for k, value in enumerate(result)]
    elif hasattr(result, "logits"):
        items = [(LOGITS, result.logits)]
    else:
        items = list(getattr(result, "__dict__", {}).items())
    tensors = []
    for name, value in items:
        if any(part in str(name) for part in _BY_PRODUCTS):
            continue
        if isinstance(value, Tensor):
            tensors.append((str(name), value))
        elif isinstance(value, tuple | list) and all(isinstance(v, Tensor) for v in value):
            tensors.extend((f"{name}[{k}]", v) for k, v in enumerate(value))
        elif isinstance(value, tuple | list | Mapping) or is_dataclass(value):
            tensors.extend((f"{name}.{inner}", v) for inner, v in _named_tensors(value))
    return tensors


# ------------------------------------------------------------------------------- which rows count


def _counted_rows(output: Tensor, batch: Batch, model: nn.Module) -> Tensor | None:
    """A mask over the output's rows (all but the last axis, flattened); None: all count."""
    lead = tuple(output.shape[:-1])
    labels = batch.argument("labels")
    counted: Tensor | None = None
    if isinstance(labels, Tensor) and tuple(labels.shape) == lead:
        if shifts_labels(model):
            # Position t predicts label t + 1; the last position predicts nothing.
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        counted = labels != -100
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    hidden = batch.argument("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if isinstance(hidden, Tensor) and tuple(hidden.shape) == lead:
        shown = hidden != 0
        counted = shown if counted is None else counted & shown
    return None if counted is None else counted.reshape(-1)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a position is compared with the next label: what transformers' decoders do."""
    kind = getattr(model, "loss_type", None)  # None for decoders with names of an older kind
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    older = kind is None and type(model).__name__.endswith("LMHeadModel")
    return (
        kind == "ForCausalLM"
        or older
        or (kind == "ForConditionalGeneration" and not encoder_decoder)
    )


def row_mask(x: Tensor, batch: Batch, contract: str) -> Tensor | None:
    """Which rows of a site's input the batch's masks count; None where they do not apply."""
    lead = tuple(x.shape) if contract == "lookup" else tuple(x.shape[:-1])
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.argument(name)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        if lead == tuple(mask.shape) or lead == (mask.numel(),):
            return (mask != 0).reshape(-1)
        if contract == "lookup" and lead in (mask.shape[1:], (1, mask.shape[1])):
            return (mask != 0).any(0)  # a table of positions: one row for the whole batch
    return None


def split(batches: tuple[Batch, ...]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Batches to learn from, and those held out: every fourth, of fewer every second."""
    step = 4 if len(batches) >= 4 else 2
    held_out = batches[step - 1 :: step]
    return tuple(b for k, b in enumerate(batches) if k % step != step - 1), held_out


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

    ``variances`` holds the variance of every output of the dense model, summed over its width.
    """

    loss_fn: LossFunction | None
    variances: Mapping[str, float]
    unit: str

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_fn: LossFunction | None,
        run: Callable[[nn.Module, Batch], Any] = call,
    ) -> PreservedLoss:
        """Learn the outputs' variance from one pass over the calibration data.

        What ``run`` gives for a batch are the outputs; by default, the model's own.
        """
        if loss_fn is not None:
            return cls(loss_fn, {}, "loss_fn")
        sums: dict[str, _Sums] = {}
        with untouched(model):
            for batch in batches:
                for output in outputs_of(run(model, batch), batch, model):
                    _require_finite(output, batch)
                    if output.logits:
                        return cls(None, {}, "nats")
                    sums.setdefault(output.name, _Sums()).add(output.rows.double())
        variances = {name: found.variance for name, found in sums.items()}
        return cls(None, variances, "relative squared error")

    def probe(
        self, result: Any, batch: Batch, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """A scalar whose gradient g is one sample with E[g gᵀ] = rows x the Hessian, and rows.

        For logits: the log-likelihood of labels drawn from the model's own prediction (the true
        Fisher). For other outputs: Gaussian probes scaled by the variance (Gauss-Newton).
        """
        if self.loss_fn is not None:
            rows = _row_total(result, batch, model)
            # The mean's gradient is 1/rows of each row's: scaled so that the rule above holds.
            return self._of_the_caller(result, batch) * rows, rows
        outputs = outputs_of(result, batch, model)
        total = outputs[0].rows.new_zeros((), dtype=torch.float32)
        for output in outputs:
            _require_finite(output, batch)
            rows = output.rows.float()
            # Every output is a mean over its own rows: bring them to the first one's count.
            share = math.sqrt(outputs[0].rows.shape[0] / max(rows.shape[0], 1))
            if output.logits:
                chance = rows.detach().softmax(-1).cpu()
                drawn = torch.multinomial(chance, 1, generator=generator).to(rows.device)
                total = total - share * rows.log_softmax(-1).gather(1, drawn).sum()
            else:
                noise = torch.randn(rows.shape, generator=generator).to(rows.device)
                scale = math.sqrt(2.0 / max(self.variances[output.name], 1e-30))
                total = total + share * scale * (noise * rows).sum()
        return total, outputs[0].rows.shape[0]

    def require_finite(self, result: Any, batch: Batch, model: nn.Module) -> None:
        """Raises ModelError where the dense model's outputs are no numbers to preserve."""
        if self.loss_fn is None:
            for output in outputs_of(result, batch, model):
                _require_finite(output, batch)

    def _of_the_caller(self, result: Any, batch: Batch) -> Tensor:
        """What ``loss_fn`` gives for a batch."""
        assert self.loss_fn is not None
        loss = self.loss_fn(result, batch.given)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise AnalysisError(
                f"loss_fn gave {given} for batch {batch.number}, which is no scalar tensor",
                way_out="return a tensor of one entry that depends on the outputs, such as a mean",
            )
        return loss.reshape(())

    def distance(
        self, dense: Any, result: Any, batch: Batch, model: nn.Module
    ) -> tuple[Tensor, int]:
        """The rise of the loss on one batch, differentiable, as (sum over rows, rows)."""
        if self.loss_fn is not None:
            rows = _row_total(result, batch, model)
            rise = self._of_the_caller(result, batch) - self._of_the_caller(dense, batch)
            return rise * rows, rows
        before, after = outputs_of(dense, batch, model), outputs_of(result, batch, model)
        both = "let both return the same, in training mode as well, or pass loss_fn="
        if len(before) != len(after):
            raise ModelError(
                f"one model gives {len(before)} outputs for batch {batch.number}, the other "
                f"{len(after)}",
                way_out=both,
            )
        count = before[0].rows.shape[0]
        total = before[0].rows.new_zeros((), dtype=torch.float64)
        for a, b in zip(before, after, strict=True):
            if a.rows.shape != b.rows.shape:
                shapes = [tuple(output.rows.shape) for output in (a, b)]
                raise ModelError(
                    f"one model gives {shapes[0]} rows and entries of {a.name} for batch "
                    f"{batch.number}, the other {shapes[1]}",
                    way_out=both,
                )
            share = count / max(a.rows.shape[0], 1)
            if a.logits:
                total = total + share * divergence(a.rows, b.rows)
            else:
                error = (a.rows - b.rows).double().square().sum()
                total = total + share * error / max(self.variances[a.name], 1e-30)
        return total, count

    def rise(self, dense: Any, result: Any, batch: Batch, model: nn.Module) -> tuple[float, int]:
        """The rise of the loss on one batch as (sum over rows, rows)."""
        with torch.no_grad():
            total, rows = self.distance(dense, result, batch, model)
        return float(total), rows

    def mean_distance(self, model: nn.Module, dense: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean rise of the loss a row, over batches that both models are run on."""
        total, rows = 0.0, 0
        for batch in batches:
            # In a compressed model factors run as well: what it raises is not told as its own.
            wanted, got = call(dense, batch), model(*batch.args, **batch.kwargs)
            part, count = self.rise(wanted, got, batch, model)
            total, rows = total + part, rows + count
        return total / max(rows, 1)


def _require_finite(output: Output, batch: Batch) -> None:
    # A chance of zero is a logit of minus infinity.
    values = output.rows.amax(-1) if output.logits else output.rows
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"the dense model's {output.name} for batch {batch.number} is not finite",
            way_out="leave that batch out, or run the model in a wider dtype",
        )


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL of the prediction to the dense model's, in nats, its sum over rows of logits."""
    return _divergence_terms(dense, logits).sum(dtype=torch.float64)


def row_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL of the prediction to the dense model's, in nats, of every row of logits."""
    return _divergence_terms(dense, logits).sum(-1)


def _divergence_terms(dense: Tensor, logits: Tensor) -> Tensor:
    p, q = dense.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)  # chance 0: no loss


def _row_total(result: Any, batch: Batch, model: nn.Module) -> int:
    try:
        return max(outputs_of(result, batch, model)[0].rows.shape[0], 1)
    except CaptureError:
        return 1
