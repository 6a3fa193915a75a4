"""Low rank without the numbers that a change of basis can remove: U V = U' [I | V'], in some order.

U V = (U B) (B⁻¹ V) for every B. With B = V[:, p], r columns p of V, the second factor has an
identity in these columns, which need be neither stored nor multiplied: what stays are m r numbers
of U' = U B and r (n - r) of V' = B⁻¹ V[:, rest], as many as a matrix of rank r has degrees of
freedom. (Zhao et al., "PIFA", ICML 2025, keep rows of finished layers so.)

How exact that is hangs on p. Elimination with pivoting finds columns that span the rows of V; then
columns are exchanged as long as an entry of V' is above a bound. Every exchange multiplies |det B|
by that entry, so it ends: a strong rank-revealing factorization (Gu and Eisenstat 1996), as the
search for a submatrix of large volume (Goreinov and Tyrtyshnikov 2001).

Columns may be chosen in groups of neighbours, which are read faster. Then the groups are those that
add the largest volume, one after the other. That bounds no entry of V', so smaller groups are taken
where rounding would cost too much.
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

_COSTS = 8.0
"""How many times what rounding costs plain factors it may cost where columns are in groups, before
errors are made up for: that takes more than half of it."""

_TINY = 1e-08
"""What a matrix of products lacks to be surely positive, in its mean."""

_BLOCK = 64
"""Columns that are rounded before the others hear of it."""

_ADDS = 1e-12
"""The squared length that a group adds at least to those before it, for each of its columns."""


@dataclass(frozen=True)
class Pivoted:
    """U' (M, R), V' (R, N - R), and the columns in their order: those kept, then the rest.

    ``order`` (N / g,) numbers groups of g neighbours: column ``columns(order, N)[k]`` of U V is
    column k of [U' | U' V']. Both parts ascend, but for a group that is kept in part: it stands
    between them.
    """

    left: Tensor
    rest: Tensor
    order: Tensor


def pivoted(left: Tensor, right: Tensor, bound: float = BOUND, neighbours: int = 1) -> Pivoted:
    """Remove r² numbers from U (M, R) and V (R, N), R <= N; computed in float64.

    No entry of V' is larger than ``bound``, which is above 1. The columns depend on V
    alone, and not on the scales of its rows; the same V gives the same.

    ``neighbours``: a power of two that divides N, the most columns that stay together. Where
    rounding would cost too many times what it costs U and V, fewer do.

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
    while neighbours > 1:
        order = _groups(span, rank, neighbours)
        if order is not None:
            found = _with_order(left, span, upper, order)
            if _rounding(found.left, found.rest, 1.0) <= _COSTS**2 * _rounding(left, right, 0.0):
                return found
        neighbours //= 2
    pivots = torch.linalg.lu_factor(span).pivots
    order = _permutation(pivots, n)
    kept, others = _exchanged(span, order[:rank], order[rank:], bound)
    return _with_order(left, span, upper, _ascending(kept, others))


def pivoted_in_parts(left: Tensor, right: Tensor, parts: int) -> Pivoted | None:
    """The same with as many kept columns in each of so many equal parts of V's, for whoever holds
    one part of them; ``parts`` divides R and N.

    Columns are exchanged within their part only, so that the bound holds there; None where
    rounding would cost too many times what it costs U and V.
    """
    span, upper = torch.linalg.qr(doubled(right).mT)
    kept = _spread(span, parts)
    if kept is None:
        return None
    others = torch.ones(len(span), dtype=torch.bool, device=span.device)
    others[kept] = False
    kept, others = _exchanged(span, kept, others.nonzero()[:, 0], BOUND, len(span) // parts)
    found = _with_order(left, span, upper, _ascending(kept, others))
    if _rounding(found.left, found.rest, 1.0) > _COSTS**2 * _rounding(left, right, 0.0):
        return None
    return found


def _spread(span: Tensor, parts: int) -> Tensor | None:
    """As many rows of each part of an orthonormal matrix (N, R) as make R: in each those that are
    farthest from what is spanned; None where a part has not so many."""
    n, rank = span.shape
    left, size = span.clone(), n // parts
    chosen: list[int] = []
    for part in range(parts):
        free = torch.zeros(n, dtype=torch.bool, device=span.device)
        free[part * size : (part + 1) * size] = True
        for _ in range(rank // parts):
            lengths = left.square().sum(1).where(free, -1.0)
            best = int(lengths.argmax())
            if not lengths[best] > _ADDS:
                return None
            chosen.append(best)
            free[best] = False
            new = left[best] / lengths[best].sqrt()
            left -= torch.outer(left @ new, new)
    return torch.tensor(chosen, device=span.device)


def columns(order: Tensor, n: int) -> Tensor:
    """The order (…, N) of all columns, for that of groups of neighbours (…, N / g)."""
    width = n // order.shape[-1]
    if not torch.jit.is_tracing() and width == 1:  # type: ignore[attr-defined]
        return order
    within = torch.arange(width, dtype=order.dtype, device=order.device)
    return (order.unsqueeze(-1) * width + within).flatten(-2)


def _ascending(kept: Tensor, others: Tensor) -> Tensor:
    return torch.cat([kept.sort().values, others.sort().values]).to(torch.int32)


def _with_order(left: Tensor, span: Tensor, upper: Tensor, order: Tensor) -> Pivoted:
    """The form that an order gives, for V = (span upper)ᵀ."""
    n, rank = span.shape
    kept, others = columns(order, n).long().split([rank, n - rank])
    basis = span[kept]
    rest = torch.linalg.solve(basis, span[others], left=False).mT
    return Pivoted(doubled(left) @ (upper.mT @ basis.mT), rest, order)


def _rounding(left: Tensor, right: Tensor, identity: float) -> Tensor:
    """What rounding every entry of both costs the product, in squares of half an eps.

    ``identity``: 1 where an identity stands beside the second factor, which is not rounded.
    """
    down, across = left.double().square().sum(0), right.double().square().sum(1)
    return (down * (identity + 2 * across)).sum()


def _groups(span: Tensor, rank: int, width: int) -> Tensor | None:
    """Groups of so many rows of an orthonormal matrix (N, R) whose first R rows span a volume, then
    the others; None where no groups do."""
    n = len(span)
    rows = span.contiguous().view(-1, width, rank)  # read once for each group
    left = rows @ rows.mT  # of what is not yet spanned
    basis = span.new_zeros(rank, rank)
    free = torch.ones(n // width, dtype=torch.bool, device=span.device)
    chosen: list[int] = []
    for done in range(0, rank, width):
        size = min(width, rank - done)
        volumes = torch.linalg.det(left[:, :size, :size]).where(free, -1.0)
        best = int(volumes.argmax())
        if not volumes[best] > _ADDS**size:
            return None
        chosen.append(best)
        free[best] = False
        known, new = basis[:, :done], rows[best, :size].mT
        for _ in range(2):  # once more for what rounding left
            new = new - known @ (known.mT @ new)
        new = torch.linalg.qr(new).Q
        basis[:, done : done + size] = new
        seen = (rows.view(n, rank) @ new).view(-1, width, size)
        left -= seen @ seen.mT
    kept = torch.tensor(chosen, device=span.device)
    whole, part = kept.split([rank // width, len(kept) - rank // width])
    ends = torch.cat([whole.sort().values, part])
    return torch.cat([ends, free.nonzero()[:, 0]]).to(torch.int32)


def rounded(found: Pivoted, dtype: torch.dtype) -> Pivoted:
    """The same in another dtype: V' is rounded, then U' solved for what V' has become, and rounded.

    What an entry loses the next ones make up for, so that rounding costs about what it costs plain
    factors.
    """
    if torch.finfo(dtype).eps < _NEGLIGIBLE:
        return Pivoted(found.left.to(dtype), found.rest.to(dtype), found.order)
    rest = _rounded(found.rest.mT, found.left.mT @ found.left, dtype).mT
    best = _best(found.left, _identity(rest.double()), found.rest, rest)
    return Pivoted(rounded_left(best, rest, dtype), rest, found.order)


def rounded_left(left: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """U' in another dtype, V' staying as it is."""
    if torch.finfo(dtype).eps < _NEGLIGIBLE:
        return left.to(dtype)
    return _rounded(left.double(), _gram(rest.double()), dtype)


def _rounded(matrix: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (M, K) rounded so that the error E has a small tr(E G Eᵀ): column by column, each
    error taken off what is to come (as GPTQ, Frantar et al. 2023, does it for integers)."""
    size = len(gram)
    sure = gram + _TINY * gram.diagonal().mean() * torch.eye(size).to(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sure))
    weights = torch.linalg.cholesky(inverse, upper=True)
    weights = weights / weights.diagonal().unsqueeze(1)
    left = matrix.mT.contiguous()
    found = left.to(dtype)
    for first in range(0, size, _BLOCK):
        end = min(first + _BLOCK, size)
        for k in range(first, end):
            found[k] = left[k].to(dtype)
            left[k] -= found[k]  # what is lost, from here on
            left[k + 1 : end].addr_(weights[k, k + 1 : end], left[k], alpha=-1)
        left[end:] -= weights[first:end, end:].mT @ left[first:end]
    return found.mT.contiguous()


def fitted(left: Tensor, right: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    """The best U' (M, R) for U (M, R) and V (R, N) where V' and the order are given; in float64.

    They are those of V: what several weights with one V have in common is made of it once.
    """
    every = doubled(right).index_select(1, columns(order, right.shape[1]))
    kept, others = every.split([len(rest), rest.shape[1]], dim=1)
    return _best(left, kept, others, rest)


def _best(left: Tensor, kept: Tensor, others: Tensor, rest: Tensor) -> Tensor:
    """The U' of least ‖U' [I | V'] - U [K | O]‖, for V' as it was rounded."""
    # Normal equations in U', which the identity keeps sane.
    now = doubled(rest)
    across, own = kept + others @ now.mH, torch.linalg.cholesky(_gram(now))
    return torch.cholesky_solve((doubled(left) @ across).mH, own).mH


def _gram(rest: Tensor) -> Tensor:
    """V Vᴴ."""
    return _identity(rest) + rest @ rest.mH


def _identity(rest: Tensor) -> Tensor:
    return torch.eye(rest.shape[-2], dtype=rest.dtype, device=rest.device)


def plain(left: Tensor, rest: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """U (…, M, R) and V (…, R, N) with the identity in its place; differentiably.

    Of a stack, every matrix has an order of its own.
    """
    return left, whole(rest, order)


def whole(rest: Tensor, order: Tensor) -> Tensor:
    """V (…, R, N) of V' (…, R, N - R); differentiably."""
    return placed(rest, columns(order, sum(rest.shape[-2:])).argsort(-1))


def placed(rest: Tensor, places: Tensor) -> Tensor:
    """V (…, R, N): of each column (…, N) its place in [I | V']; differentiably."""
    together = torch.cat([_identity(rest).expand(*rest.shape[:-1], -1), rest], dim=-1)
    if places.dim() == 1:  # in a tenth of the time
        return together.index_select(1, places)
    return together.gather(-1, places.unsqueeze(-2).expand_as(together))


def _permutation(pivots: Tensor, n: int) -> Tensor:
    """The order of rows that LAPACK's exchanges give."""
    order = list(range(n))
    for k, other in enumerate(pivots.tolist()):
        order[k], order[other - 1] = order[other - 1], order[k]
    return torch.tensor(order, device=pivots.device)


def _exchanged(
    span: Tensor, kept: Tensor, others: Tensor, bound: float, part: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exchange columns until no entry of V' (here transposed: (N - R, R)) is above the bound.

    ``part``: how many columns are a part, none of which goes to another part.
    """
    kept, others = kept.clone(), others.clone()
    apart = None if part is None else (others // part)[:, None] != kept // part

    def sizes(table: Tensor) -> Tensor:
        return table.abs() if apart is None else table.abs().masked_fill_(apart, 0.0)

    while True:
        table = torch.linalg.solve(span[kept], span[others], left=False)
        changed = False
        while table.numel():
            largest, place = sizes(table).flatten().max(0)
            if float(largest) <= bound:
                break
            row, column = divmod(int(place), table.shape[1])
            kept[column], others[row] = others[row].clone(), kept[column].clone()
            # One step of Gauss and Jordan.
            down, across = table[:, column].clone(), table[row] / table[row, column]
            table.addr_(down, across, alpha=-1)
            table[:, column] = down / down[row]
            table[row] = -across
            table[row, column] = 1 / down[row]
            changed = True
        if not changed:  # else once more from the start, without the rounding of all steps
            return kept, others
