"""How far a model's outputs are from the dense one's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

TEXT, CLASSES, OUTPUTS = "text", "classes", "outputs"
"""Logits of a vocabulary at every position, logits of a few classes, and everything else."""
NEIGHBOURS = 10


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


def class_figures(confusion: Tensor, names: Mapping[int, str]) -> tuple[ClassFigures, ...]:
    """Precision and recall of every class that occurs, of counts (true class, given class)."""
    counts = confusion.double()
    right, truth, given = counts.diagonal(), counts.sum(1), counts.sum(0)
    return tuple(
        ClassFigures(
            names.get(k, str(k)),
            int(truth[k]),
            float(right[k] / given[k].clamp_min(1)),
            float(right[k] / truth[k]),
        )
        for k in range(len(counts))
        if truth[k] > 0
    )


def macro(classes: Sequence[ClassFigures]) -> tuple[float, float]:
    """The means over classes of precision and of recall."""
    precisions, recalls = ([getattr(c, name) for c in classes] for name in ("precision", "recall"))
    return statistics.fmean(precisions), statistics.fmean(recalls)


@dataclass(frozen=True)
class ChoiceFigures:
    """How a model answers questions with several answers.

    ``right``: by likelihood, ``right_by_length``: by likelihood over the answers' lengths;
    ``same``: the share of answers that are the dense model's; ``precision`` and ``recall``: means
    over ``classes``, the answers, or their places A, B, C.
    """

    questions: int
    right: float
    right_by_length: float
    same: float
    precision: float
    recall: float
    classes: tuple[ClassFigures, ...]


@dataclass(frozen=True)
class TaskFigures:
    """What a task of the caller's gave for a model: its name and value, in units of its own."""

    name: str
    value: float


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
