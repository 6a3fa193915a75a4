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
            end = "…" if p.last_batch is None else str(p.last_batch)
            flops = f"{p.constant} + {p.slope} B"
            peak = f"max({p.peak_constant}, {p.peak_slope} B)"
            span = f"{p.first_batch}–{end}"
            lines.append(f"{span:>16}  {flops:>28}  {peak:>22}  {p.tree}")
        return "\n".join(lines)


# --------------------------------------------------------------------------------- training plans


@dataclass(frozen=True)
class TrainingStep:
    """A value with a name: the output ``"y"``, a gradient, or one that is used more than once.

    ``tree`` gives it, from the input ``"x"``, the output's gradient ``"g"``, cores by number, and
    values with a name; ``axes`` are its indices. Gradients are ``"dx"``, ``"d0"``, ``"d1"``, ….
    """

    name: str
    tree: Tree
    axes: tuple[str, ...]


@dataclass(frozen=True)
class TrainingPiece:
    """How a contraction and its gradients are computed for some batches.

    ``forward`` ends with ``"y"``, ``backward`` with the gradients; ``saved`` are the values that
    the backward pass takes from the forward pass, the input among them (``"x"``) where it needs it.
    What stands in both is computed twice. Both passes cost ``constant + slope * B`` FLOPs,
    ``saved`` has ``saved_constant + saved_slope * B`` elements.
    """

    forward: tuple[TrainingStep, ...]
    backward: tuple[TrainingStep, ...]
    saved: tuple[str, ...]
    first_batch: int
    last_batch: int | None
    constant: int
    slope: int
    saved_constant: int
    saved_slope: int


@dataclass(frozen=True)
class TrainingPlan:
    """Orders for a contraction and its gradients, chosen together, for every batch.

    ``gradients`` are the operands that get one: ``"x"`` and cores by number. FLOPs are counted as
    in a ``ContractionPlan``. The input counts as saved where the backward pass needs it; cores are
    parameters and do not.
    """

    spec: TTSpec
    contract: str
    gradients: tuple[int | str, ...]
    pieces: tuple[TrainingPiece, ...]

    def piece(self, batch: int) -> TrainingPiece:
        """The piece that is used for ``batch`` rows (at least 1)."""
        return next(p for p in self.pieces if p.last_batch is None or batch <= p.last_batch)

    def flops(self, batch: int) -> int:
        """FLOPs of the forward and the backward pass together."""
        piece = self.piece(batch)
        return piece.constant + piece.slope * batch

    def saved_elements(self, batch: int) -> int:
        """Elements that the forward pass leaves for the backward pass."""
        piece = self.piece(batch)
        return piece.saved_constant + piece.saved_slope * batch

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """The first batch of every piece but the first."""
        return tuple(piece.first_batch for piece in self.pieces[1:])

    def __str__(self) -> str:
        names = ", ".join("x" if g == "x" else f"core {g}" for g in self.gradients)
        lines = [f"training of {self.spec} with its {self.contract}: gradients of {names}"]
        for p in self.pieces:
            end = "…" if p.last_batch is None else str(p.last_batch)
            lines.append(
                f"batch {p.first_batch}–{end}: {p.constant} + {p.slope} B FLOPs, "
                f"{p.saved_constant} + {p.saved_slope} B elements saved ({', '.join(p.saved)})"
            )
            for title, steps in (("forward", p.forward), ("backward", p.backward)):
                lines += [f"  {title:>8}  {step.name} = {step.tree}" for step in steps]
        return "\n".join(lines)
