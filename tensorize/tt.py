"""Tensor-train algebra on matrices: TT-SVD, reconstruction, rounding and error bounds.

The conventions are those of ``TTSpec``: a matrix of (m, n) is reshaped to its row modes and column
modes, these are interleaved to (m0 n0, m1 n1, …), and core k has shape
(ranks[k-1], row_modes[k], column_modes[k], ranks[k]), of which axes of size 1 that the spec does
not name are left out.

Sources: I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011), for TT-SVD
(algorithm 1), rounding (algorithm 2) and the quasi-optimality bound (theorem 2.2).

Block low rank (``TTSpec.block``) is here too: its blocks are matrices of their own, each with the
best approximation of its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from tensorize.errors import AnalysisError
from tensorize.ir import BLOCK, TTSpec

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

# ------------------------------------------------------------------------------ reconstruction


def reconstruct(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
    """The dense weight that the cores stand for.

    The cores are contracted one after the other, and the axes are put in order by one permute at
    the end. Low rank needs none: it is the plain product ``U @ V``.

    Args:
        spec: the factorization.
        cores: one tensor a core, of the shapes ``spec.core_shapes``.

    Returns:
        A tensor of (m, n), or (experts, m, n), in the dtype and on the device of the cores. It is
        differentiable with respect to them.

    Raises:
        ValueError: number or shapes of the cores are not those of the spec.
    """
    _check_cores(spec, cores)
    weight, names = cores[0], spec.cores[0]
    for k in range(1, len(cores)):
        needed = {*spec.batch, *spec.rows, *spec.columns}.union(*spec.cores[k + 1 :])
        weight, names = _contract(spec, weight, names, cores[k], spec.cores[k], needed)
    order = (*spec.batch, *spec.rows, *spec.columns)
    return _permute(weight, names, order).reshape(spec.shape)


def _contract(
    spec: TTSpec,
    left: Tensor,
    left_names: tuple[str, ...],
    right: Tensor,
    right_names: tuple[str, ...],
    needed: set[str],
) -> tuple[Tensor, tuple[str, ...]]:
    """One pairwise contraction as a (batched) matmul; shared indices in ``needed`` are kept."""
    shared = [name for name in left_names if name in right_names]
    batch = [name for name in shared if name in needed]
    summed = [name for name in shared if name not in needed]
    left_free = [name for name in left_names if name not in shared]
    right_free = [name for name in right_names if name not in shared]

    def size(names: Sequence[str]) -> int:
        return math.prod([spec.size[name] for name in names])  # dynamo takes no generator

    lead = [size(batch)] if batch else []
    left = _permute(left, left_names, (*batch, *left_free, *summed))
    right = _permute(right, right_names, (*batch, *summed, *right_free))
    product = left.reshape(*lead, size(left_free), size(summed)) @ right.reshape(
        *lead, size(summed), size(right_free)
    )
    names = (*batch, *left_free, *right_free)
    return product.reshape([spec.size[name] for name in names]), names


def _permute(tensor: Tensor, names: tuple[str, ...], order: tuple[str, ...]) -> Tensor:
    if names == order:
        return tensor
    return tensor.permute([names.index(name) for name in order])


def _check_cores(spec: TTSpec, cores: Sequence[Tensor]) -> None:
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != spec.core_shapes:
        raise ValueError(f"{spec} has cores of shapes {spec.core_shapes}, got {shapes}")


# --------------------------------------------------------------------------------------- modes


def max_ranks(row_modes: Sequence[int], column_modes: Sequence[int]) -> tuple[int, ...]:
    """The largest inner ranks that can ever be needed: the smaller side of each unfolding.

    Args:
        row_modes: factors of the number of rows, one a core.
        column_modes: factors of the number of columns, one a core.

    Returns:
        d-1 integers; entry k is min(∏ modes up to core k, ∏ modes after core k).
    """
    modes = [m * n for m, n in zip(row_modes, column_modes, strict=True)]
    return tuple(
        min(math.prod(modes[: k + 1]), math.prod(modes[k + 1 :])) for k in range(len(modes) - 1)
    )


@lru_cache(maxsize=4096)
def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """``size`` as a product of ``count`` factors that are as equal as they can be.

    The factors have the smallest sum (for a fixed product: the most equal ones); among equal sums
    the smallest largest factor is taken. They come in non-increasing order: 12 in two is (4, 3), a
    prime p in three is (p, 1, 1).

    Raises:
        ValueError: ``size`` or ``count`` is not positive.
    """
    if size < 1 or count < 1:
        raise ValueError(f"size and count are positive, got {size} and {count}")
    divisors = _divisors(size)

    @cache
    def best(rest: int, left: int, largest: int) -> tuple[int, tuple[int, ...]] | None:
        """(sum, factors) of the best split of ``rest`` with no factor above ``largest``."""
        if left == 1:
            return (rest, (rest,)) if rest <= largest else None
        found: tuple[int, tuple[int, ...]] | None = None
        for factor in divisors:
            if factor > largest:
                break
            if rest % factor or factor**left < rest:
                continue
            # The other factors sum to at least (left-1) times their geometric mean. This bound
            # rises with the factor; one is taken off because the root is a rounded float.
            others = (left - 1) * (rest / factor) ** (1 / (left - 1))
            if found is not None and factor + others - 1 > found[0]:
                break
            tail = best(rest // factor, left - 1, factor)
            if tail is not None:
                candidate = (factor + tail[0], (factor, *tail[1]))
                found = candidate if found is None else min(found, candidate)
        return found

    result = best(size, count, size)
    assert result is not None, "(size, 1, …, 1) is always a solution"
    return result[1]


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``."""
    return max(divisor for divisor in _divisors(size) if divisor <= limit)


def _divisors(size: int) -> tuple[int, ...]:
    small = [k for k in range(1, math.isqrt(size) + 1) if size % k == 0]
    return tuple(sorted({*small, *(size // k for k in small)}))


# ------------------------------------------------------------------------------ decomposition


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition that does not give up.

    LAPACK's divide and conquer fails to converge on some matrices that a different algorithm
    handles. Those are done by the eigendecomposition of the smaller Gram matrix in float64: leading
    singular values to full accuracy, those below about 1e-8 of the largest only to that level.

    Args:
        matrix: (m, n), real, at least float32.

    Returns:
        U of (m, k), the singular values of (k,) in non-increasing order, and Vᵀ of (k, n), with
        k = min(m, n), in the matrix's dtype.

    Raises:
        AnalysisError: the matrix holds NaN or infinity.
    """
    _check_finite(matrix)
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except _LinAlgError:
        u, s, vh = _gram_svd(matrix)
    return u, s, vh


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition through eigh of the smaller Gram matrix, in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _gram_svd(matrix.mT)
        return vh.mT, s, u.mT
    tall = matrix.to(torch.float64)
    # Scaled, so that squaring neither overflows nor underflows.
    scale = tall.abs().amax() if tall.numel() else tall.new_ones(())
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    tall = tall / scale
    _, vectors = torch.linalg.eigh(tall.mT @ tall)
    v = vectors.flip(-1)
    # The columns of A V are s u. QR instead of a division by s: U stays orthonormal where s is 0.
    q, r = torch.linalg.qr(tall @ v)
    diagonal = r.diagonal()
    s, order = diagonal.abs().sort(descending=True, stable=True)
    u = q * torch.where(diagonal < 0, -1.0, 1.0)
    dtype = matrix.dtype
    return u[:, order].to(dtype), (s * scale).to(dtype), v[:, order].mT.to(dtype)


def _singular_values(matrix: Tensor) -> Tensor:
    _check_finite(matrix)
    try:
        return torch.linalg.svdvals(matrix)
    except _LinAlgError:
        return _gram_svd(matrix)[1]


def _check_finite(matrix: Tensor) -> None:
    if not torch.isfinite(matrix).all():
        raise AnalysisError(
            "the matrix to decompose holds NaN or infinity",
            way_out="check the weight, or exclude its site",
        )


def tt_svd(
    matrix: Tensor,
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
) -> tuple[TTSpec, list[Tensor]]:
    """TT-SVD (Oseledets 2011, algorithm 1) of a matrix with interleaved row and column modes.

    The result is quasi-optimal: its error is at most sqrt(d-1) times that of the best TT matrix of
    the same ranks, and at most ``error_bound(unfolding_spectra(…), spec.ranks)``. All cores but the
    last are left-orthogonal; the last one carries the norm. For d = 2 it is the truncated SVD of
    one unfolding, hence optimal.

    Args:
        matrix: (m, n). Below float32 the arithmetic is done in float32.
        row_modes: d factors of m.
        column_modes: d factors of n.
        ranks: one inner rank for all, or d-1 of them; larger ones are clipped to the largest that
            exist.
        max_error: instead of ranks, the largest relative Frobenius error
            ‖W - W̃‖ / ‖W‖ (up to rounding); every unfolding may lose max_error / sqrt(d-1).
            With neither ``ranks`` nor ``max_error`` the result is exact, at full ranks.

    Returns:
        The spec with the ranks that came out, and its cores in ``spec.core_shapes``, in the dtype
        and on the device of the matrix, with no gradient.

    Raises:
        ValueError: the matrix is not a real 2-D tensor (decompose experts one by one), the modes do
            not multiply to its shape, or the ranks or the error make no sense.
        AnalysisError: the matrix holds NaN or infinity.
    """
    tensor = _interleaved(matrix, row_modes, column_modes)
    count = len(row_modes)
    wanted = _wanted_ranks(row_modes, column_modes, ranks, max_error)
    allowed = _allowed_tail(max_error, count, tensor)
    cores, found = [], []
    rest, rank = tensor, 1
    for k in range(count - 1):
        u, s, vh = svd(rest.reshape(rank * row_modes[k] * column_modes[k], -1))
        rank = _choose_rank(s, wanted[k], allowed)
        cores.append(u[:, :rank])
        rest = s[:rank, None] * vh[:rank]
        found.append(rank)
    cores.append(rest)
    spec = TTSpec(row_modes, column_modes, found)
    return spec, _stored(spec, cores, matrix.dtype)


def round_tt(
    spec: TTSpec,
    cores: Sequence[Tensor],
    ranks: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
) -> tuple[TTSpec, list[Tensor]]:
    """Lower the ranks of a tensor train (Oseledets 2011, algorithm 2) without building the matrix.

    A QR sweep from the right makes the cores right-orthogonal, an SVD sweep from the left truncates
    them. The error relative to the given train obeys the same bounds as that of ``tt_svd``.

    Args:
        spec: the factorization, without experts.
        cores: its cores, in ``spec.core_shapes``.
        ranks: one inner rank for all, or d-1 of them; larger ones are clipped.
        max_error: instead of ranks, the largest relative Frobenius error. With neither, only ranks
            that no unfolding of that shape can have are lowered, which changes nothing but the
            gauge.

    Returns:
        The new spec and its cores, in the dtype of the given ones, with no gradient. All cores but
        the last are left-orthogonal.

    Raises:
        ValueError: cores do not fit the spec, the spec has experts, or the ranks or the error make
            no sense.
        AnalysisError: a core holds NaN or infinity.
    """
    _check_cores(spec, cores)
    if spec.batch:
        raise ValueError(f"{spec} has experts: round them one by one")
    if spec.format == BLOCK:
        raise ValueError(f"{spec} is no chain: its ranks are cut by cut_block")
    rows, columns, count = spec.row_modes, spec.column_modes, len(spec.cores)
    wanted = _wanted_ranks(rows, columns, ranks, max_error)
    bonds = (1, *spec.ranks, 1)
    # Work on (left rank, modes, right rank).
    chain = [
        _computable(core).reshape(bonds[k], rows[k] * columns[k], bonds[k + 1])
        for k, core in enumerate(cores)
    ]
    for core in chain:
        _check_finite(core)
    for k in range(count - 1, 0, -1):
        _, modes, right = chain[k].shape
        q, r = torch.linalg.qr(chain[k].flatten(1).mT)
        chain[k] = q.mT.reshape(-1, modes, right)
        chain[k - 1] = chain[k - 1] @ r.mT
    allowed = _allowed_tail(max_error, count, chain[0])
    found = []
    for k in range(count - 1):
        u, s, vh = svd(chain[k].flatten(0, 1))
        rank = _choose_rank(s, wanted[k], allowed)
        chain[k] = u[:, :rank].reshape(*chain[k].shape[:2], rank)
        carried = s[:rank, None] * vh[:rank]
        chain[k + 1] = (carried @ chain[k + 1].flatten(1)).reshape(rank, *chain[k + 1].shape[1:])
        found.append(rank)
    rounded = TTSpec(rows, columns, found)
    return rounded, _stored(rounded, chain, cores[0].dtype)


def block_svd(
    matrix: Tensor, row_modes: Sequence[int], column_modes: Sequence[int], rank: int | None = None
) -> tuple[TTSpec, list[Tensor]]:
    """The best block low-rank approximation of a matrix, in the Frobenius norm.

    Every block is approximated by its own truncated SVD; no other choice is better (Eckart and
    Young 1936), as the blocks do not overlap.

    Args:
        matrix: (m, n). Below float32 the arithmetic is done in float32.
        row_modes: (m0, m1); m1 counts the blocks of rows.
        column_modes: (n0, n1); n0 counts the blocks of columns.
        rank: of every block; larger ones are clipped to min(m0, n1), which is exact (the default).

    Returns:
        The spec and its cores in ``spec.core_shapes``, in the dtype and on the device of the
        matrix, with no gradient. The two cores of a component have equal norms in every block.

    Raises:
        ValueError: the matrix is not a real 2-D tensor, or the modes do not multiply to its shape.
        AnalysisError: the matrix holds NaN or infinity.
    """
    (m0, m1), (n0, n1) = row_modes, column_modes
    full = min(m0, n1)
    rank = full if rank is None else min(rank, full)
    spec = TTSpec.block(row_modes, column_modes, rank)
    _check_matrix(matrix, spec)
    blocks = _computable(matrix).reshape(m0, m1, n0, n1)
    left = blocks.new_empty(m1, m0, n0, rank)
    right = blocks.new_empty(n0, m1, rank, n1)
    for i in range(m1):
        for j in range(n0):
            u, s, vh = svd(blocks[:, i, j])
            root = s[:rank].sqrt()
            left[i, :, j] = u[:, :rank] * root
            right[j, i] = root[:, None] * vh[:rank]
    return spec, _stored(spec, [left, right], matrix.dtype)


def cut_block(spec: TTSpec, cores: Sequence[Tensor], rank: int) -> tuple[TTSpec, list[Tensor]]:
    """The first ``rank`` components of every block: of a ``block_svd`` again the best ones.

    Raises:
        ValueError: cores do not fit the spec, or it is not block low rank.
    """
    _check_cores(spec, cores)
    if spec.format != BLOCK:
        raise ValueError(f"{spec} is not block low rank")
    cut = spec.with_ranks((min(rank, *spec.ranks),))
    slices = [
        core.narrow(names.index("r1"), 0, cut.ranks[0])
        for core, names in zip(cores, spec.cores, strict=True)
    ]
    return cut, _stored(cut, slices, cores[0].dtype)


def _computable(tensor: Tensor) -> Tensor:
    """Without gradient, and in a dtype that LAPACK has."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _interleaved(matrix: Tensor, row_modes: Sequence[int], column_modes: Sequence[int]) -> Tensor:
    """The matrix as a tensor of (m0, n0, m1, n1, …)."""
    count = len(row_modes)
    _check_matrix(matrix, TTSpec(row_modes, column_modes, (1,) * (count - 1)))
    tensor = _computable(matrix).reshape(*row_modes, *column_modes)
    return tensor.permute([axis for k in range(count) for axis in (k, count + k)])


def _check_matrix(matrix: Tensor, spec: TTSpec) -> None:
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"a real matrix is needed, got {matrix.dtype} of {tuple(matrix.shape)}; "
            "stacked experts are decomposed one by one"
        )
    if spec.shape != tuple(matrix.shape):
        raise ValueError(
            f"row modes {spec.row_modes} and column modes {spec.column_modes} make a matrix of "
            f"{spec.shape}, the given one is {tuple(matrix.shape)}"
        )


def _wanted_ranks(
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: int | Sequence[int] | None,
    max_error: float | None,
) -> tuple[int, ...]:
    """One upper limit a bond; the error, if one is given, does the rest."""
    if ranks is not None and max_error is not None:
        raise ValueError("give ranks or max_error, not both")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise ValueError(f"max_error is a finite number of at least 0, got {max_error}")
    largest = max_ranks(row_modes, column_modes)
    if ranks is None:
        return largest
    wanted = (ranks,) * len(largest) if isinstance(ranks, int) else tuple(ranks)
    if len(wanted) != len(largest) or any(rank < 1 for rank in wanted):
        raise ValueError(
            f"{len(largest) + 1} cores have {len(largest)} inner ranks of at least 1, got {ranks}"
        )
    return tuple(min(pair) for pair in zip(wanted, largest, strict=True))


def _allowed_tail(max_error: float | None, count: int, whole: Tensor) -> float | None:
    """What each of the d-1 truncations may discard, as an absolute Frobenius norm."""
    if max_error is None:
        return None
    return max_error * whole.to(torch.float64).norm().item() / math.sqrt(max(count - 1, 1))


def _choose_rank(singular_values: Tensor, largest: int, allowed: float | None) -> int:
    limit = min(largest, singular_values.numel())
    if allowed is None:
        return limit
    small_enough = _tails(singular_values) <= allowed
    return min(limit, max(1, int(small_enough.to(torch.int64).argmax())))


def _tails(singular_values: Tensor) -> Tensor:
    """Norms of what is discarded at rank 0, 1, …, k: (k + 1,), float64, the last one is 0."""
    return tails(singular_values.to(torch.float64).square()).sqrt()


def tails(squares: Tensor) -> Tensor:
    """What is lost at rank 0, 1, …, k, Σ of the squares beyond it: (k + 1,), the last one is 0."""
    # Summed from the smallest up, so that small tails keep their digits.
    sums = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _stored(spec: TTSpec, cores: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Own, contiguous tensors in the shapes of the spec: a slice would keep the whole SVD alive."""
    return [
        core.reshape(shape).to(dtype, memory_format=torch.contiguous_format, copy=True)
        for core, shape in zip(cores, spec.core_shapes, strict=True)
    ]


# --------------------------------------------------------------------------------- error bounds


def unfolding_spectra(
    matrix: Tensor, row_modes: Sequence[int], column_modes: Sequence[int]
) -> list[Tensor]:
    """Singular values of each of the d-1 unfoldings of the interleaved matrix.

    Args:
        matrix: (m, n).
        row_modes: d factors of m.
        column_modes: d factors of n.

    Returns:
        d-1 vectors in non-increasing order, entry k of length ``max_ranks(…)[k]``.

    Raises:
        ValueError: as ``tt_svd``.
        AnalysisError: the matrix holds NaN or infinity.
    """
    tensor = _interleaved(matrix, row_modes, column_modes)
    spectra, rows = [], 1
    for k in range(len(row_modes) - 1):
        rows *= row_modes[k] * column_modes[k]
        spectra.append(_singular_values(tensor.reshape(rows, -1)))
    return spectra


def error_bound(spectra: Sequence[Tensor], ranks: int | Sequence[int]) -> float:
    """Upper bound of the absolute Frobenius error of TT-SVD at these ranks.

    sqrt(Σ_k ε_k²), where ε_k is the norm of the singular values that unfolding k loses (Oseledets
    2011, theorem 2.2). The best TT matrix of these ranks obeys it too.

    Args:
        spectra: what ``unfolding_spectra`` gives.
        ranks: one inner rank for all, or one an unfolding.

    Raises:
        ValueError: there is not one rank of at least 1 for each unfolding.
    """
    return math.hypot(*_discarded(spectra, ranks))


def error_lower_bound(spectra: Sequence[Tensor], ranks: int | Sequence[int]) -> float:
    """Lower bound of the absolute Frobenius error of any TT matrix of these ranks.

    max_k ε_k: unfolding k of such a matrix has at most rank ranks[k], and no matrix of that rank is
    closer than the truncated SVD (Eckart and Young 1936). ``error_bound`` is at most sqrt(d-1)
    times this.

    Args:
        spectra: what ``unfolding_spectra`` gives.
        ranks: one inner rank for all, or one an unfolding.

    Raises:
        ValueError: there is not one rank of at least 1 for each unfolding.
    """
    return max(_discarded(spectra, ranks), default=0.0)


def _discarded(spectra: Sequence[Tensor], ranks: int | Sequence[int]) -> list[float]:
    wanted = (ranks,) * len(spectra) if isinstance(ranks, int) else tuple(ranks)
    if len(wanted) != len(spectra) or any(rank < 1 for rank in wanted):
        raise ValueError(f"{len(spectra)} unfoldings need as many ranks of at least 1, got {ranks}")
    return [_tails(s)[min(rank, s.numel())].item() for s, rank in zip(spectra, wanted, strict=True)]
