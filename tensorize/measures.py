"""What is measured of a model beside the dense one: outputs row by row, and what it costs to run.

A row is what an output has one vector for: a token, a sample. Rows that masks hide count in
nothing (``passes/preserved.py``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.errors import CaptureError
from tensorize.ir import Batch
from tensorize.passes.preserved import (
    Output,
    PreservedLoss,
    outputs_of,
    row_divergence,
)
from tensorize.tensors import plain_parts

TEXT, CLASSES, OUTPUTS = "text", "classes", "outputs"
"""Logits of a vocabulary at every position, logits of a few classes, and everything else."""
NEIGHBOURS = 10
_IGNORED = -100
_CHUNK = 1024  # rows of logits that are worked on at once: a vocabulary is wide
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 30, 5, 0.5


@dataclass(frozen=True)
class Worst:
    """The row that is furthest from the dense model's.

    ``row`` counts the rows of the output in the batch, those that masks hide among them; ``text``
    is what stands up to and at a token, where the tokens are known.
    """

    value: float
    batch: int
    row: int
    text: str = ""


@dataclass(frozen=True)
class ClassFigures:
    """One class: how many rows have it, and how well a model finds it."""

    name: str
    rows: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Quality:
    """What a model's outputs are worth, and how far they are from the dense model's.

    Args:
        distance: the loss to preserve, a mean over rows: KL in nats, or squared error relative to
            the outputs' variance.
        tail: the distance that 1 % of the rows exceed.
        worst: the row with the largest distance.
        loss: cross-entropy of the text or the labels, in nats a row.
        top1, top5: shares of the likeliest, and of the five likeliest, that are the dense model's.
        accuracy, precision, recall: with labels of classes; the last two are means over classes.
        cosine, worst_cosine: of the samples' embeddings, to the dense model's.
        neighbours: share of the nearest other samples that are the dense model's.
    """

    distance: float
    tail: float
    worst: Worst
    loss: float | None = None
    top1: float | None = None
    top5: float | None = None
    accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    classes: tuple[ClassFigures, ...] = ()
    cosine: float | None = None
    worst_cosine: float | None = None
    neighbours: float | None = None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


# ------------------------------------------------------------------------------------ the outputs


@dataclass(frozen=True)
class Sample:
    """One batch: the call, the targets of the rows, and the ids that the model was given.

    ``counted`` is the call with the labels, whether forward takes them or not: it says which rows
    count. ``targets`` have one entry a row of the output, hidden ones too.
    """

    batch: Batch
    counted: Batch
    targets: Tensor | None
    ids: Tensor | None


def _check_labels(labels: Tensor, classes: int, number: int) -> None:
    """Raises CaptureError for a label that is no class."""
    counted = labels[labels != _IGNORED]
    odd = counted[(counted < 0) | (counted >= classes)]
    if len(odd):
        raise CaptureError(
            f"batch {number} has a label {int(odd[0])}, and its output {classes} classes",
            way_out=f"labels are 0 to {classes - 1}, or {_IGNORED} for what does not count",
        )


class Meter:
    """Takes the outputs of one model batch by batch, beside the dense model's.

    ``loss`` is the loss to preserve; ``names`` those of the classes.
    """

    def __init__(self, kind: str, loss: PreservedLoss, names: Mapping[int, str]) -> None:
        self.kind, self.loss, self.names = kind, loss, names
        self.distances: list[Tensor] = []
        self.total, self.rows = 0.0, 0
        self.cross_entropy, self.targets, self.right = 0.0, 0, 0
        self.first, self.fifth, self.compared = 0.0, 0.0, 0
        self.worst: tuple[float, int, int, Tensor | None] = (-math.inf, 0, 0, None)
        self.confusion: Tensor | None = None
        self.embeddings: list[tuple[Tensor, Tensor]] = []

    def add(self, dense: Any, result: Any, sample: Sample, model: nn.Module) -> None:
        """Measure one batch."""
        batch = sample.counted
        before, after = outputs_of(dense, batch, model)[0], outputs_of(result, batch, model)[0]
        places = before.places
        wanted = None
        if sample.targets is not None:
            if sample.targets.numel() != math.prod(before.shape[:-1]):
                raise CaptureError(
                    f"batch {sample.batch.number} has labels of shape "
                    f"{tuple(sample.targets.shape)}, and an output of shape {before.shape}",
                    way_out="give one label for each row of the output",
                )
            wanted = sample.targets.reshape(-1)[places.to(sample.targets.device)]
            _check_labels(wanted, before.rows.shape[-1], batch.number)
        if before.logits or self.kind == CLASSES:
            self._agreement(before.rows, after.rows, wanted)
        if before.logits:
            distance = _divergences(before.rows, after.rows)
            total, rows = float(distance.sum(dtype=torch.float64)), len(distance)
        else:
            variance = max(self.loss.variances[before.name], 1e-30)
            distance = (after.rows - before.rows).double().square().sum(-1).cpu() / variance
            if self.kind != CLASSES:
                self.embeddings.append((_embeddings(before), _embeddings(after)))
            total, rows = self.loss.rise(dense, result, batch, model)
        self.total, self.rows = self.total + total, self.rows + rows
        self.distances.append(distance.float())
        if not len(distance):
            return
        largest = torch.nan_to_num(distance, nan=math.inf).argmax()
        value, row = float(distance[largest]), int(places[largest])
        if math.isnan(value) or value > self.worst[0]:
            ids = sample.ids
            its_own = ids is not None and ids.numel() == math.prod(before.shape[:-1])
            self.worst = (value, sample.batch.number, row, ids if its_own else None)

    def _agreement(self, dense: Tensor, logits: Tensor, wanted: Tensor | None) -> None:
        five = min(5, dense.shape[-1])
        for start in range(0, len(dense), _CHUNK):
            p, q = dense[start : start + _CHUNK], logits[start : start + _CHUNK]
            ours, theirs = q.topk(five).indices, p.topk(five).indices
            self.first += int((ours[:, 0] == theirs[:, 0]).sum())
            self.fifth += int((ours[:, :, None] == theirs[:, None]).sum()) / five
            self.compared += len(p)
            if wanted is not None:
                self._against(q, wanted[start : start + _CHUNK].to(q.device))

    def _against(self, logits: Tensor, wanted: Tensor) -> None:
        counted = wanted != _IGNORED
        logits, wanted = logits[counted].float(), wanted[counted]
        self.cross_entropy += float(F.cross_entropy(logits, wanted, reduction="sum"))
        self.targets += len(wanted)
        given = logits.argmax(-1)
        self.right += int((given == wanted).sum())
        if self.kind == CLASSES:
            count = logits.shape[-1]
            pairs = torch.bincount((wanted * count + given).cpu(), minlength=count * count)
            found = pairs.reshape(count, count)
            self.confusion = found if self.confusion is None else self.confusion + found

    def quality(self, decode: Callable[[Sequence[int]], str] | None) -> Quality:
        """What came of all batches.

        Raises:
            CaptureError: not one row counted.
        """
        distances = torch.cat(self.distances)
        if not len(distances):
            raise CaptureError(
                "no row of the batches counts: masks hide all of them",
                way_out="look at their attention_mask and labels",
            )
        value, batch, row, ids = self.worst
        text = ""
        if decode is not None and ids is not None:
            width = ids.shape[-1]
            start = row // width * width  # of the sequence that the token is in
            text = decode(ids.reshape(-1)[max(start, row - 15) : row + 1].tolist())
        found: dict[str, Any] = {}
        if self.embeddings:
            before, after = (torch.cat(side).float() for side in zip(*self.embeddings, strict=True))
            cosines = F.cosine_similarity(before, after, dim=-1)
            found["cosine"], found["worst_cosine"] = float(cosines.mean()), float(cosines.min())
            if len(before) > 2:
                found["neighbours"] = neighbour_agreement(before, after)
        if self.compared:
            found["top1"] = self.first / self.compared
            found["top5"] = self.fifth / self.compared
        if self.targets:
            found["loss"] = self.cross_entropy / self.targets
            if self.confusion is not None:
                found |= {"accuracy": self.right / self.targets, **self._classes()}
        return Quality(
            distance=self.total / max(self.rows, 1),
            tail=float(torch.quantile(_thinned(distances), 0.99)),
            worst=Worst(value, batch, row, text),
            **found,
        )

    def _classes(self) -> dict[str, Any]:
        """Precision and recall of every class that occurs, and their means."""
        assert self.confusion is not None
        confusion = self.confusion.double()
        right, truth, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        classes = tuple(
            ClassFigures(
                self.names.get(k, str(k)),
                int(truth[k]),
                float(right[k] / given[k].clamp_min(1)),
                float(right[k] / truth[k]),
            )
            for k in range(len(confusion))
            if truth[k] > 0
        )
        return {
            "classes": classes,
            "precision": statistics.fmean(c.precision for c in classes),
            "recall": statistics.fmean(c.recall for c in classes),
        }


def _divergences(dense: Tensor, logits: Tensor) -> Tensor:
    parts = zip(dense.split(_CHUNK), logits.split(_CHUNK), strict=True)
    return torch.cat([row_divergence(p, q).cpu() for p, q in parts])


def _embeddings(output: Output) -> Tensor:
    """One vector a sample: the mean of its rows that count."""
    rows, samples = output.rows.cpu(), output.shape[0] if output.shape else 1
    if len(output.shape) < 3:
        return rows.reshape(-1, rows.shape[-1])
    places = output.places // math.prod(output.shape[1:-1])
    sums = rows.new_zeros(samples, rows.shape[-1]).index_add(0, places, rows)
    counts = torch.bincount(places, minlength=samples)
    return (sums / counts.clamp_min(1)[:, None])[counts > 0]


def neighbour_agreement(dense: Tensor, other: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of each sample's k nearest others, by cosine, that are the same in both."""
    k = min(k, len(dense) - 1)
    near = []
    for embeddings in (dense, other):
        unit = F.normalize(embeddings.float(), dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
        near.append(similarity.topk(k).indices)
    return float((near[0][:, :, None] == near[1][:, None]).any(2).double().mean())


def _thinned(values: Tensor, most: int = 2**20) -> Tensor:
    """So many of the values that torch finds a quantile of them."""
    return values[:: math.ceil(len(values) / most)] if len(values) > most else values


# ---------------------------------------------------------------------------------------- the cost


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each counted once; quantized ones as they are stored."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(part.numel() * part.element_size() for t in tensors for part in plain_parts(t))


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch: of every tensor with as many entries as the first tensor."""
    tensors = [t for t in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if _has_samples(t)]
    if not tensors:
        return batch
    count = len(tensors[0])

    def cut(value: Any) -> Any:
        return value[:1] if _has_samples(value) and len(value) == count else value

    args, kwargs = pytree.tree_map(cut, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, kwargs or args)


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def times(models: Sequence[nn.Module], batch: Batch) -> list[float]:
    """Seconds of a call of each model, the medians of some rounds.

    Each round takes one model after the other, so that whatever else the machine does hits all.
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    found: list[list[float]] = [[] for _ in models]
    began = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        enough = turn > _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS * len(models)
        if enough:
            break
        for step in range(len(models)):
            k = (turn + step) % len(models)  # no model always follows the same one
            _synchronize(device)
            start = time.perf_counter()
            models[k](*batch.args, **batch.kwargs)
            _synchronize(device)
            if turn:  # the first round warms up
                found[k].append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------- the text


def continued(model: nn.Module, ids: Tensor, new_tokens: int, longest: int) -> list[int]:
    """The likeliest continuation of ids (1, T), token by token, with transformers' cache or not.

    ``longest`` tokens are what the model surely takes at once.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is not None and hasattr(model, "generate"):
        greedy = type(config)(
            do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True,
            eos_token_id=config.eos_token_id,
        )  # fmt: skip
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
        return out[0, ids.shape[1] :].tolist()
    start = ids.shape[1]
    for _ in range(new_tokens):
        logits = model(ids[:, -longest:]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()
