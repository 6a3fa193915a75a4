"""The loss to preserve: how far a model's outputs are from the dense model's own.

By default it is measured on the outputs themselves, as a mean over output rows (tokens): the KL
divergence in nats where the output has ``.logits``, else the squared error relative to the
outputs' variance. A caller's ``loss_fn`` replaces it. Rows that the attention mask hides, and rows
whose label is -100, count in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.errors import CaptureError
from tensorize.forward import untouched
from tensorize.ir import Batch

LossFunction = Callable[[Any, Any], Tensor]

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


def call(model: nn.Module, batch: Batch, position: int) -> Any:
    """The model's outputs for a batch of the caller's data.

    Raises:
        CaptureError: the batch does not fit the model's forward; it says which batch.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except Exception as error:
        raise CaptureError(
            f"batch {position} does not fit the model's forward: {type(error).__name__}: {error}",
            way_out="a batch is a tensor, a tuple of positional or a dict of keyword arguments",
        ) from error


def outputs_of(result: Any, batch: Batch, model: nn.Module) -> list[Output]:
    """The tensors to preserve among a model's outputs, with only the rows that count."""
    chosen = _preserved_tensors(result)
    if not chosen:
        raise CaptureError(
            f"the model's output ({type(result).__name__}) holds no floating-point tensor",
            way_out="pass loss_fn=, a function (outputs, batch) -> scalar",
        )
    found = []
    for name, tensor in chosen:
        flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 0 else tensor.reshape(1, 1)
        counted = _counted_rows(tensor, batch, model)
        rows = flat if counted is None else flat[counted]
        found.append(Output(rows, name == "logits", name, tuple(tensor.shape), counted))
    return found


def samples_of(result: Any) -> int | None:
    """The number of samples of a batch, where every output has one row for each of them."""
    leads = [tensor.shape[:-1] for _, tensor in _preserved_tensors(result)]
    counts = {lead[0] if lead else 1 for lead in leads}
    pooled = all(math.prod(lead[1:]) <= 1 for lead in leads)
    return counts.pop() if pooled and len(counts) == 1 else None


def _preserved_tensors(result: Any) -> list[tuple[str, Tensor]]:
    """The logits of a model's outputs; where there are none, all that could count."""
    named = [(name, t) for name, t in _named_tensors(result) if t.is_floating_point()]
    return [(name, t) for name, t in named if name == "logits"] or named


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
        items = [("logits", result.logits)]
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
    return tensors


# ------------------------------------------------------------------------------- which rows count


def _counted_rows(output: Tensor, batch: Batch, model: nn.Module) -> Tensor | None:
    """A mask over the output's rows (all but the last axis, flattened); None: all count."""
    lead = tuple(output.shape[:-1])
    labels = batch.kwargs.get("labels")
    counted: Tensor | None = None
    if isinstance(labels, Tensor) and tuple(labels.shape) == lead:
        if shifts_labels(model):
            # Position t predicts label t + 1; the last position predicts nothing.
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        counted = labels != -100
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    hidden = batch.kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
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
        mask = batch.kwargs.get(name)
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
        run: Callable[[nn.Module, Batch, int], Any] = call,
    ) -> PreservedLoss:
        """Learn the outputs' variance from one pass over the calibration data.

        What ``run`` gives for a batch are the outputs; by default, the model's own.
        """
        if loss_fn is not None:
            return cls(loss_fn, {}, "loss_fn")
        sums: dict[str, list[Any]] = {}
        with untouched(model):
            for position, batch in enumerate(batches):
                for output in outputs_of(run(model, batch, position), batch, model):
                    if output.logits:
                        return cls(None, {}, "nats")
                    rows = output.rows.double()
                    total = sums.setdefault(output.name, [0, 0.0, 0.0])
                    total[0] += rows.shape[0]
                    total[1] = total[1] + rows.sum(0)
                    total[2] += float(rows.square().sum())
        variances = {}
        for name, (count, total, squares) in sums.items():
            mean_square = squares / max(count, 1)
            variance = mean_square - float((total / max(count, 1)).square().sum())
            # One row, or constant outputs, have no variance to compare with: their size serves.
            variances[name] = variance if variance > 1e-6 * mean_square else mean_square
        return cls(None, variances, "relative squared error")

    def probe(
        self, result: Any, batch: Batch, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """A scalar whose gradient g is one sample with E[g gᵀ] = rows x the Hessian, and rows.

        For logits: the log-likelihood of labels drawn from the model's own prediction (the true
        Fisher). For other outputs: Gaussian probes scaled by the variance (Gauss-Newton).
        """
        if self.loss_fn is not None:
            loss = self.loss_fn(result, batch.given)
            rows = _row_total(result, batch, model)
            # The mean's gradient is 1/rows of each row's: scaled so that the rule above holds.
            return loss * rows, rows
        outputs = outputs_of(result, batch, model)
        total = outputs[0].rows.new_zeros((), dtype=torch.float32)
        for output in outputs:
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

    def distance(
        self, dense: Any, result: Any, batch: Batch, model: nn.Module
    ) -> tuple[Tensor, int]:
        """The rise of the loss on one batch, differentiable, as (sum over rows, rows)."""
        if self.loss_fn is not None:
            rows = _row_total(result, batch, model)
            rise = self.loss_fn(result, batch.given) - self.loss_fn(dense, batch.given)
            return rise * rows, rows
        before, after = outputs_of(dense, batch, model), outputs_of(result, batch, model)
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

    def rise(self, dense: Any, result: Any, batch: Batch, model: nn.Module) -> tuple[float, int]:
        """The rise of the loss on one batch as (sum over rows, rows)."""
        with torch.no_grad():
            total, rows = self.distance(dense, result, batch, model)
        return float(total), rows

    def mean_distance(self, model: nn.Module, dense: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean rise of the loss a row, over batches that both models are run on."""
        total, rows = 0.0, 0
        for position, batch in enumerate(batches):
            wanted, got = call(dense, batch, position), call(model, batch, position)
            part, count = self.rise(wanted, got, batch, model)
            total, rows = total + part, rows + count
        return total / max(rows, 1)


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
