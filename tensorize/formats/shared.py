"""Low rank where weights of one input have their first factor in common."""

from __future__ import annotations

from tensorize.formats.format import Format
from tensorize.ir.spec import LOW_RANK, SHARED, Spec


class Shared(Format[Spec]):
    """One more choice for low-rank weights (q, k, v; gate, up): their specs are low rank."""

    name = SHARED
    title = "shared first factor"
    unasked = joins = True
    brings = (LOW_RANK,)
