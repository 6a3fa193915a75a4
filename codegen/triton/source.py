"""From a description of what one launch computes to the text of its Triton kernel.

``Work`` says what is computed and ``Tiles`` how it is cut (``triton_work``). Nothing here imports
triton: the text does, and it runs alone.

    forward    y = epilogue(norm(x) Wᵀ) with everything between the cores kept on chip; W of low
               rank, of two cores that may share indices (block low rank), or a chain of small cores
    decode     the same for few rows and low rank: every program takes a slice of the rank, of the
               summed entries and of the outputs; the last one to arrive adds up
    lookup     rows of W by number
    gradients  of two cores, from what the passes over x and over the gradient of y saved

Weights in codes are multiplied matrix by matrix (``coded.py``).

Several weights that read one x are one launch (q, k, v), or one output where ``gated``. The
gradient for x is ``forward`` with the other ``contract``.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorize.codegen.triton import chain, pair, pair_gradients
from tensorize.codegen.triton import decode as triton_decode
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered, Tiles, check, is_pair
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work


def forward(work: Work, tiles: Tiles) -> Source:
    """The kernel that keeps what is between the cores on chip.

    Raises:
        NotCovered: no family computes the work.
    """
    check(work)
    if len(work.specs[0].cores) == 2:
        return pair.forward(work, tiles)
    if work.saved:
        raise NotCovered("only two cores leave one intermediate for the gradients")
    return chain.forward(work, tiles)


def decode(work: Work, tiles: Tiles) -> Source:
    """The kernel for few rows: split over rank, summed entries and outputs; low rank only.

    Raises:
        NotCovered: no family computes the work.
    """
    check(work)
    if any(spec.pivoted for spec in work.specs):
        raise NotCovered("few rows: no columns in an order, whose sums no slice of the rank has")
    return triton_decode.decode(work, tiles)


def lookup(
    spec: TTSpec, tiles: Tiles, notes: Sequence[str] = (), *, guarded: bool = False
) -> Source:
    """The kernel that gives rows of W by number; ``guarded``: every one is checked.

    Raises:
        NotCovered: no family computes it.
    """
    work = Work((spec,), "rows", guarded=guarded, notes=tuple(notes))
    check(work)
    if is_pair(spec):
        return pair.lookup(work, tiles)
    return chain.lookup(work, tiles)


def gradients(spec: TTSpec, contract: str, tiles: Tiles, notes: Sequence[str] = ()) -> Source:
    """The kernel that gives the gradients of both cores.

    Raises:
        NotCovered: the spec has not two cores.
    """
    check(Work((spec,), contract, saved=True))
    return pair_gradients.gradients(spec, contract, tiles, tuple(notes))
