"""How far a sum may be off by rounding alone, as calibration saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MARGIN = 3.0
"""A limit over the largest value that calibration saw: 3 times the maximum of 44 thousand rows gave
no false alarm in 176 thousand others."""
NARROW_MARGIN = 2.0
"""The same of 16 bits: it is y that is rounded, each entry by half an eps of itself at most."""

_LEAST = 2.0
_LOW, _SHARE = 0.1, 0.01


@dataclass(frozen=True)
class Limit:
    """A row may be off by ``relative`` times its scale; and any row by ``floor``, which nearly all
    rows are below: what a batch is tried against first."""

    relative: float
    floor: float


@dataclass
class Seen:
    """What calibration saw of one use in one dtype: how far off rows were, and their scales."""

    off: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    def note(self, off: Tensor, scale: Tensor) -> None:
        """Of some rows."""
        known = torch.isfinite(off) & torch.isfinite(scale)
        self.off.append(off[known].abs().float().cpu())
        self.scales.append(scale[known].float().cpu())

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.off)

    def limit(self, rounding: float, margin: float = MARGIN) -> Limit | None:
        """The limit; None where nothing was seen. ``rounding``: what one operation may do to a row
        of scale 1."""
        if self.rows == 0:
            return None
        off, scales = torch.cat(self.off), torch.cat(self.scales)
        typical = float(scales.median())
        if typical == 0.0:
            typical = float(scales.max()) or 1.0
        low = max(_quantile(scales, _LOW), _SHARE * typical)
        relative = margin * max(float((off / scales.clamp(min=low)).max()), _LEAST * rounding)
        return Limit(relative, relative * low)


def _quantile(values: Tensor, share: float) -> float:
    ordered = values.sort().values
    return float(ordered[math.floor(share * (len(ordered) - 1))])
