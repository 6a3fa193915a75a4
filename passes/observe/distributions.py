"""Outputs that are distributions, however they are called: logits, log-probabilities, chances.

What is called ``logits`` is known by its name. Of other outputs the numbers tell: rows whose
exponentials add up to 1 in every batch are log-probabilities, rows that do so themselves are
chances. No other output has such rows unless it is made to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tensorize.passes.observe.outputs import Output

Reading = Literal["logits", "squared", "probabilities"]
"""How rows are compared: as logits (or log-probabilities), as numbers, as chances."""

WORDS: dict[Reading, str] = {"logits": "log-probabilities", "probabilities": "probabilities"}
_EXACT, _HALF = 1e-3, 0.05


@dataclass
class Looks:
    """What the rows of one output look like in all batches so far."""

    known: set[Reading] = field(default_factory=lambda: {"logits", "probabilities"})

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
