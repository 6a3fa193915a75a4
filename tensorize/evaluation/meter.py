"""What is measured of a model beside the dense one: outputs row by row, and what it costs to run.

A row is what an output has one vector for: a token, a sample. Rows that masks hide count in
nothing (``passes/observe/loss.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.base.errors import CaptureError
from tensorize.base.tensors import plain_parts
from tensorize.evaluation.quality import CLASSES, NEIGHBOURS, Quality, Worst, class_figures, macro
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import PreservedLoss, row_divergence
from tensorize.passes.observe.outputs import Output

_IGNORED = -100
_CHUNK = 1024  # rows of logits that are worked on at once: a vocabulary is wide


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
        before, after = (self.loss.outputs(each, batch, model)[0] for each in (dense, result))
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
        classes = class_figures(self.confusion, self.names)
        precision, recall = macro(classes)
        return {"classes": classes, "precision": precision, "recall": recall}


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
