"""Contraction orders: trees, the batches they hold for, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tensorize.ir.spec import TTSpec

if TYPE_CHECKING:
    import sympy

Tree = int | str | tuple["Tree", "Tree"]
"""A contraction tree: ``"x"`` is the input, an integer k is core k, a pair is a contraction."""


@dataclass(frozen=True)
class ContractionPiece:
    """One contraction tree and the batches for which it is the cheapest.

    Its cost is ``constant + slope * B`` FLOPs and its largest intermediate has
    ``peak_constant`` or ``peak_slope * B`` elements, whichever is more. ``layout`` is which of the
    emitter's ways to lay out what lies between runs: the one of least predicted time, or another
    that was timed.
    """

    tree: Tree
    first_batch: int
    last_batch: int | None
    constant: int
    slope: int
    peak_constant: int
    peak_slope: int
    layout: int = 0

    def flops(self, batch: int) -> int:
        return self.constant + self.slope * batch


def typical_batch(first_batch: int, last_batch: int | None) -> int:
    """What stands for a range of batches, where one number must; far ones do not count."""
    far = 64 * first_batch
    return round((first_batch * min(last_batch or far, far)) ** 0.5)


@dataclass(frozen=True)
class ContractionPlan:
    """The cheapest contraction order for every batch: the lower envelope of lines in B.

    ``contract`` says which side of the weight meets the input: ``"columns"`` for y = x Wᵀ (a
    linear layer), ``"rows"`` for y = x W. FLOPs are counted as opt_einsum does: the product of all
    index sizes of a pairwise contraction, twice when an index is summed.

    Examples:
        >>> plan = tensorize.plan_contraction(tensorize.TTSpec.low_rank(64, 32, 4))
        >>> plan.flops(1)  # of one row: two FLOPs a parameter
        768
    """

    spec: TTSpec
    contract: str
    pieces: tuple[ContractionPiece, ...]

    def piece(self, batch: int) -> ContractionPiece:
        """The piece that is used for ``batch`` rows (at least 1)."""
        for piece in self.pieces:
            if piece.last_batch is None or batch <= piece.last_batch:
                return piece
        raise AssertionError("the last piece of a contraction plan has no end")

    def flops(self, batch: int) -> int:
        """FLOPs of the cheapest order for ``batch`` rows."""
        return self.piece(batch).flops(batch)

    def peak_elements(self, batch: int) -> int:
        """Elements of the largest intermediate or output of that order."""
        piece = self.piece(batch)
        return max(piece.peak_constant, piece.peak_slope * batch)

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """The first batch of every piece but the first."""
        return tuple(piece.first_batch for piece in self.pieces[1:])

    @cached_property
    def expression(self) -> sympy.Expr:
        """FLOPs as a sympy expression in the batch symbol ``B``."""
        import sympy  # only who asks for an expression waits for it

        batch = sympy.Symbol("B", positive=True, integer=True)
        lines = [sympy.Integer(p.constant) + p.slope * batch for p in self.pieces]
        conditions = [
            batch <= p.last_batch if p.last_batch is not None else sympy.true for p in self.pieces
        ]
        return sympy.Piecewise(*zip(lines, conditions, strict=True))

    def __str__(self) -> str:
        lines = [f"contraction of {self.spec} with its {self.contract}"]
        lines.append(f"{'batch':>16}  {'FLOPs':>28}  {'peak elements':>22}  order")
        for p in self.pieces:
            end = "..." if p.last_batch is None else str(p.last_batch)
            flops = f"{p.constant} + {p.slope} B"
            peak = f"max({p.peak_constant}, {p.peak_slope} B)"
            span = f"{p.first_batch}-{end}"
            lines.append(f"{span:>16}  {flops:>28}  {peak:>22}  {p.tree}")
        return "\n".join(lines)
