"""Outputs that are distributions, however they are called: logits, log-probabilities, chances.

What is called ``logits`` is known by its name. Of other outputs the numbers tell: rows whose
exponentials add up to 1 in every batch are log-probabilities, rows that do so themselves are
chances. No other output has such rows unless it is made to.

Parameters of other distributions (a mean and a spread) and logits by another name are numbers like
others. Where the model says that it gives the first, or where classes stand in the data beside what
could be the second, it is to be asked about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from tensorize.ir.sites import Batch
from tensorize.passes.observe.hidden import IGNORED
from tensorize.passes.observe.outputs import Output

Reading = Literal["logits", "squared", "probabilities"]
"""How rows are compared: as logits (or log-probabilities), as numbers, as chances."""

WORDS: dict[Reading, str] = {"logits": "log-probabilities", "probabilities": "probabilities"}
_EXACT, _HALF = 1e-3, 0.05


@dataclass
class Looks:
    """What the rows of one output look like in all batches so far; ``classes``: whether each of
    them holds a class for every row."""

    known: set[Reading] = field(default_factory=lambda: {"logits", "probabilities"})
    classes: bool = True

    def add(self, rows: Tensor) -> None:
        """See more rows (R, width)."""
        if rows.shape[-1] < 2:
            self.known = set()
        if not self.known or not len(rows):
            return
        wide = rows.detach().float()
        close = _HALF if rows.dtype.itemsize < 4 else _EXACT
        if "logits" in self.known and not _all_near(wide.logsumexp(-1), 0.0, close):
            self.known.discard("logits")
        sums = _all_near(wide.sum(-1), 1.0, close)
        if "probabilities" in self.known and not (sums and bool((wide >= 0).all())):
            self.known.discard("probabilities")

    @property
    def reading(self) -> Reading | None:
        """How they are to be read; None: as numbers."""
        return next(iter(self.known)) if len(self.known) == 1 else None


def _all_near(values: Tensor, wanted: float, close: float) -> bool:
    return bool(((values - wanted).abs() <= close).all())


def as_read(output: Output, reading: Reading | None) -> Output:
    """An output in the form in which its rows are compared; None: as its name says."""
    if reading is None:
        return output
    if reading == "probabilities":
        tiny = torch.finfo(output.rows.dtype).tiny
        return replace(output, rows=output.rows.clamp_min(tiny).log(), logits=True)
    return replace(output, logits=reading == "logits")


def parametrised(result: Any, model: nn.Module) -> str | None:
    """The name of the distribution whose parameters a model's outputs are; None: of none.

    torch's own are known by their kind, heads of transformers by their place in the model.
    """
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    given = [leaf for leaf in leaves if isinstance(leaf, Distribution)]
    if given:
        return type(given[0]).__name__
    head = getattr(model, "distribution_output", None)
    known = getattr(head, "distribution_class", None)
    return None if known is None else known.__name__


def has_classes(output: Output, batch: Batch) -> bool:
    """Whether a batch holds, beside what the model is given, a class for every row of an output."""
    width = output.shape[-1]
    if width < 2:
        return False
    given = {id(leaf) for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs)))}
    return any(
        isinstance(leaf, Tensor)
        and leaf.dtype in (torch.int64, torch.int32)
        and id(leaf) not in given
        and tuple(leaf.shape) == output.shape[:-1]
        and bool(((leaf >= 0) | (leaf == IGNORED)).all())
        and int(leaf.max()) < width
        for leaf in pytree.tree_leaves(batch.given)
    )
