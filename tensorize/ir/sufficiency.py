"""How far calibration data suffice: what new data will hold that they did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tensorize.base import printer

OUTPUTS = 32
"""Rows of outputs to measure predictions on, that are enough."""
MOST_UNSEEN = 0.1
"""Of lookups to come, the share of rows never seen that is borne without a warning."""


@dataclass(frozen=True)
class Sufficiency:
    """Three figures, each from 0 to 1, which is enough.

    Args:
        outputs: the rows of outputs that predictions were measured on, over 32.
        rows: of the weight that is worst off, the rows that it met over its columns: with fewer
            there are directions that nothing is known of.
        lookups: of the table that is worst off, the chance that the next row that is looked up (a
            word, an element) was met: one less the share of lookups of rows that were met once.
        weight, table: which these are.

    Good, "The population frequencies of species", Biometrika 40 (1953), for ``lookups``.
    """

    outputs: float = 1.0
    rows: float = 1.0
    lookups: float = 1.0
    weight: str = ""
    table: str = ""

    @property
    def least(self) -> float:
        """The figure: the least of the three."""
        return min(self.outputs, self.rows, self.lookups)

    def __str__(self) -> str:
        return f"{printer.percent(self.least)} of what is enough{''.join(self._missing)}"

    @property
    def _missing(self) -> Iterator[str]:
        if self.outputs < 1:
            yield f"; rows of outputs to measure on {printer.percent(self.outputs)}"
        if self.rows < 1:
            yield f"; rows that {self.weight} met {printer.percent(self.rows)}"
        if self.lookups < 1:
            yield f"; lookups in {self.table} that were foreseen {printer.percent(self.lookups)}"
