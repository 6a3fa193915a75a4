"""A model's outputs as rows that count: which tensors, which rows, which samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import CaptureError, ModelError
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once
from tensorize.ir.sites import Batch
from tensorize.passes.observe.hidden import counted_rows, loss_of

LOGITS = "logits"
# Outputs that are by-products: caches, and copies of what other outputs already hold.
_BY_PRODUCTS = ("loss", "past_key_values", "hidden_states", "attentions", "cache", "router")
# What a forecast is called, of a number or of a distribution's parameters, and what it is made of.
_FORECASTS, _HIDDEN = ("prediction", "params"), "hidden_state"


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

    @property
    def samples(self) -> int:
        """How many samples it is of."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def sample(self) -> Tensor:
        """The sample of every counted row, on the CPU."""
        return self.places // max(math.prod(self.shape[1:-1]), 1)


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch of the caller's data.

    Raises:
        ModelError: the batch does not fit the model's forward; it says which batch.
    """
    with fitting(model, batch):
        return once(model, batch)


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
        counted = counted_rows(entries, batch, model, result)
        rows = flat if counted is None else flat[counted]
        logits = name == LOGITS and flat.shape[-1] > 1  # a single one is a score, no chance
        found.append(Output(rows, logits, name, tuple(entries.shape), counted))
    return found


def essential(result: Any) -> Any:
    """Of a model's outputs what is to be preserved, and its own loss: no keys and values."""
    loss = loss_of(result)
    return ({} if loss is None else {"loss": loss}) | dict(_preserved_tensors(result))


def samples_of(result: Any, model: nn.Module) -> int | None:
    """The number of samples of a batch, where every output has one row for each of them."""
    leads = [
        _by_rows(name, tensor, model).shape[:-1] for name, tensor in _preserved_tensors(result)
    ]
    counts = {lead[0] if lead else 1 for lead in leads}
    pooled = all(math.prod(lead[1:]) <= 1 for lead in leads)
    return counts.pop() if pooled and len(counts) == 1 else None


def row_name(result: Any, batch: Batch, model: nn.Module) -> str:
    """What a row of a model's outputs is: ``"token"``, ``"image"``, ``"sample"`` or ``"row"``."""
    samples = samples_of(result, model)
    if images_in(batch) and images_in(batch) == samples:
        return "image"
    ids = [x.shape for x in _tensors(batch) if x.dim() == 2 and not x.is_floating_point()]
    outputs = [_by_rows(*each, model).shape for each in _preserved_tensors(result)]
    if any(shape[:-1] in ids for shape in outputs):
        return "token"
    return "row" if samples is None else "sample"


def images_in(batch: Batch) -> int:
    """How many images it holds; 0 where its inputs are none."""
    found = (len(x) for x in _tensors(batch) if x.dim() == 4 and x.is_floating_point())
    return next(found, 0)


def _tensors(batch: Batch) -> list[Tensor]:
    return [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor)]


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
    """The logits of a model's outputs; where there are none, all that could count.

    That is, all but hidden states where they end in a forecast.
    """
    named = [(name, t) for name, t in _named_tensors(result) if _has_rows(t)]
    if any(part in name for name, _ in named for part in _FORECASTS):
        named = [(name, t) for name, t in named if _HIDDEN not in name]
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


def row_total(result: Any, batch: Batch, model: nn.Module) -> int:
    try:
        return max(outputs_of(result, batch, model)[0].rows.shape[0], 1)
    except CaptureError:
        return 1
