"""Low rank without the numbers that a change of basis can remove: U V = U' [I | V'], in some order.

U V = (U B) (B⁻¹ V) for every B. With B = V[:, p], r columns p of V, the second factor has an
identity in these columns, which need be neither stored nor multiplied: what stays are m r numbers
of U' = U B and r (n - r) of V' = B⁻¹ V[:, rest], as many as a matrix of rank r has degrees of
freedom. (Zhao et al., "PIFA", ICML 2025, keep rows of finished layers so.)

How exact that is hangs on p. Elimination with pivoting finds columns that span the rows of V; then
columns are exchanged as long as an entry of V' is above a bound. Every exchange multiplies |det B|
by that entry, so it ends: a strong rank-revealing factorization (Gu and Eisenstat 1996), as the
search for a submatrix of large volume (Goreinov and Tyrtyshnikov 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorize.base.tensors import doubled

BOUND = 1.05
"""The largest entry that V' may have: near 1, the least there is, a few more exchanges cost next to
nothing, and what rounding costs falls by a quarter against 2."""

_NEGLIGIBLE = 1e-05
"""A relative rounding that is not worth solving for."""


@dataclass(frozen=True)
class Pivoted:
    """U' (M, R), V' (R, N - R), and the columns (N,) in their order: those kept, then the rest.

    Column ``order[k]`` of U V is column k of [U' | U' V']. Both parts of the order ascend.
    """

    left: Tensor
    rest: Tensor
    order: Tensor


def pivoted(left: Tensor, right: Tensor, bound: float = BOUND) -> Pivoted:
    """Remove r² numbers from U (M, R) and V (R, N), R <= N; computed in float64.

    No entry of V' is larger than ``bound``, which is above 1. The columns depend on V
    alone, and not on the scales of its rows; the same V gives the same.

    Raises:
        ValueError: the bound is not above 1, or V has more rows than columns.
    """
    rank, n = right.shape
    if bound <= 1:
        raise ValueError(f"the bound must be above 1, got {bound}")
    if rank > n:
        raise ValueError(f"V has {rank} rows and only {n} columns")
    # An orthogonal basis of the rows: nothing is lost to the scales of the components.
    span, upper = torch.linalg.qr(doubled(right).mT)
    pivots = torch.linalg.lu_factor(span).pivots
    order = _permutation(pivots, n)
    kept, others = _exchanged(span, order[:rank], order[rank:], bound)
    kept, others = kept.sort().values, others.sort().values
    basis = span[kept]
    rest = torch.linalg.solve(basis, span[others], left=False).mT
    change = upper.mT @ basis.mT
    return Pivoted(doubled(left) @ change, rest, torch.cat([kept, others]).to(torch.int32))


def rounded(found: Pivoted, dtype: torch.dtype) -> Pivoted:
    """The same in another dtype: V' is rounded, and U' then the best for what V' has become.

    Of random matrices that takes a seventh to a fifth of what rounding costs (bfloat16, r = n / 2).
    """
    rest = found.rest.to(dtype)
    if torch.finfo(dtype).eps < _NEGLIGIBLE:
        return Pivoted(found.left.to(dtype), rest, found.order)
    return Pivoted(
        _best(found.left, _identity(doubled(rest)), found.rest, rest).to(dtype), rest, found.order
    )


def fitted(left: Tensor, right: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    """The best U' (M, R) for U (M, R) and V (R, N) where V' and the order are given; in float64.

    They are those of V: what several weights with one V have in common is made of it once.
    """
    kept, others = doubled(right).index_select(1, order).split([len(rest), rest.shape[1]], dim=1)
    return _best(left, kept, others, rest)


def _best(left: Tensor, kept: Tensor, others: Tensor, rest: Tensor) -> Tensor:
    """The U' of least ‖U' [I | V'] - U [K | O]‖, for V' as it was rounded."""
    # Normal equations in U', which the identity keeps sane.
    now = doubled(rest)
    across, own = kept + others @ now.mH, _identity(now) + now @ now.mH
    return torch.cholesky_solve((doubled(left) @ across).mH, torch.linalg.cholesky(own)).mH


def _identity(rest: Tensor) -> Tensor:
    return torch.eye(rest.shape[-2], dtype=rest.dtype, device=rest.device)


def plain(left: Tensor, rest: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """U (…, M, R) and V (…, R, N) with the identity in its place; differentiably.

    Of a stack, every matrix has an order of its own: (…, N).
    """
    return left, whole(rest, order)


def whole(rest: Tensor, order: Tensor) -> Tensor:
    """V (…, R, N) of V' (…, R, N - R); differentiably."""
    together = torch.cat([_identity(rest).expand(*rest.shape[:-1], -1), rest], dim=-1)
    places = order.argsort(-1)
    if order.dim() == 1:  # in a tenth of the time
        return together.index_select(1, places)
    return together.gather(-1, places.unsqueeze(-2).expand_as(together))


def _permutation(pivots: Tensor, n: int) -> Tensor:
    """The order of rows that LAPACK's exchanges give."""
    order = list(range(n))
    for k, other in enumerate(pivots.tolist()):
        order[k], order[other - 1] = order[other - 1], order[k]
    return torch.tensor(order, device=pivots.device)


def _exchanged(span: Tensor, kept: Tensor, others: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Exchange columns until no entry of V' (here transposed: (N - R, R)) is above the bound."""
    kept, others = kept.clone(), others.clone()
    while True:
        table = torch.linalg.solve(span[kept], span[others], left=False)
        changed = False
        while table.numel() and float(table.abs().max()) > bound:
            row, column = divmod(int(table.abs().argmax()), table.shape[1])
            kept[column], others[row] = others[row].clone(), kept[column].clone()
            # One step of Gauss and Jordan.
            down, across = table[:, column].clone(), table[row] / table[row, column]
            table -= torch.outer(down, across)
            table[:, column] = down / down[row]
            table[row] = -across
            table[row, column] = 1 / down[row]
            changed = True
        if not changed:  # else once more from the start, without the rounding of all steps
            return kept, others
