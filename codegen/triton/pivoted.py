"""Lines that read the columns of x by number, for weights that store no identity.

Of W = U V, V is the identity in r columns: x Vᵀ is x in these, plus the others times the factor
that is stored. The order names all columns, those of the identity first, by groups of neighbours.
"""

from __future__ import annotations

from tensorize.codegen.triton.roles import suffix
from tensorize.codegen.triton.text import Lines, Operand
from tensorize.ir.work import Work

REST = "rest"
"""The axis of the columns that the second factor holds, by their places in the order."""


def order_of(work: Work, k: int) -> Operand:
    """The order of the columns of a weight."""
    return Operand(f"order{suffix(work, k)}", (("group", 1),), "int32")


def columns(text: Lines, work: Work, k: int, column: str, place: str, within: str) -> None:
    """``column`` = the columns at some places of the order; one past the last of them where
    ``within`` does not hold ("": everywhere it does)."""
    spec, order = work.specs[k], order_of(work, k).name
    n, neighbours = spec.shape[-1], spec.pivoted
    if neighbours == n:  # nothing is moved
        text(f"{column} = " + (f"tl.where({within}, {place}, {n})" if within else place))
        return
    mask = [f"mask={within}", f"other={n}"] if within else []
    if neighbours == 1:
        text.call(f"{column} = tl.load", [f"{order} + {place}", *mask])
        return
    place = f"({place})" if " " in place else place
    text.call(f"{column} = tl.load", [f"{order} + {place} // {neighbours}", *mask])
    text(f"{column} = {column} * {neighbours} + {place} % {neighbours}")
