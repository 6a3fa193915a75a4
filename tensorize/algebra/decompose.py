"""Decompositions of matrices: TT-SVD, and block low rank.

The conventions are those of ``TTSpec``: a matrix of (m, n) is reshaped to its row modes and column
modes, these are interleaved to (m0 n0, m1 n1, …), and core k has shape
(ranks[k-1], row_modes[k], column_modes[k], ranks[k]), of which axes of size 1 that the spec does
not name are left out.

Sources: I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011), for TT-SVD
(algorithm 1).

Block low rank (``TTSpec.block``) is here too: its blocks are matrices of their own, each with the
best approximation of its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.algebra.modes import check_matrix, interleaved, max_ranks
from tensorize.algebra.reconstruct import check_cores
from tensorize.algebra.svd import computable, svd
from tensorize.ir.spec import TTSpec


def tt_svd(
    matrix: Tensor,
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: int | Sequence[int] | None = None,
) -> tuple[TTSpec, list[Tensor]]:
    """TT-SVD (Oseledets 2011, algorithm 1) of a matrix with interleaved row and column modes.

    The result is quasi-optimal: its error is at most sqrt(d-1) times that of the best TT matrix of
    the same ranks, and at most sqrt(Σ_k ε_k²), where ε_k is the norm of the singular values that
    unfolding k loses (theorem 2.2). All cores but the last are left-orthogonal; the last one
    carries the norm. For d = 2 it is the truncated SVD of one unfolding, hence optimal.

    Args:
        matrix: (m, n). Below float32 the arithmetic is done in float32.
        row_modes: d factors of m.
        column_modes: d factors of n.
        ranks: one inner rank for all, or d-1 of them; larger ones are clipped to the largest that
            exist (the default, which is exact).

    Returns:
        The spec with the ranks that came out, and its cores in ``spec.core_shapes``, in the dtype
        and on the device of the matrix, with no gradient.

    Raises:
        ValueError: the matrix is not a real 2-D tensor (decompose experts one by one), the modes do
            not multiply to its shape, or the ranks make no sense.
        AnalysisError: the matrix holds NaN or infinity.
    """
    tensor = interleaved(matrix, row_modes, column_modes)
    count = len(row_modes)
    wanted = wanted_ranks(row_modes, column_modes, ranks)
    cores, found = [], []
    rest, rank = tensor, 1
    for k in range(count - 1):
        u, s, vh = svd(rest.reshape(rank * row_modes[k] * column_modes[k], -1))
        rank = min(wanted[k], s.numel())
        cores.append(u[:, :rank])
        rest = s[:rank, None] * vh[:rank]
        found.append(rank)
    cores.append(rest)
    spec = TTSpec(row_modes, column_modes, found)
    return spec, stored_cores(spec, cores, matrix.dtype)


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
    check_matrix(matrix, spec)
    blocks = computable(matrix).reshape(m0, m1, n0, n1)
    left = blocks.new_empty(m1, m0, n0, rank)
    right = blocks.new_empty(n0, m1, rank, n1)
    for i in range(m1):
        for j in range(n0):
            u, s, vh = svd(blocks[:, i, j])
            root = s[:rank].sqrt()
            left[i, :, j] = u[:, :rank] * root
            right[j, i] = root[:, None] * vh[:rank]
    return spec, stored_cores(spec, [left, right], matrix.dtype)


def cut_block(spec: TTSpec, cores: Sequence[Tensor], rank: int) -> tuple[TTSpec, list[Tensor]]:
    """The first ``rank`` components of every block: of a ``block_svd`` again the best ones.

    Raises:
        ValueError: cores do not fit the spec, or it is not block low rank.
    """
    check_cores(spec, cores)
    if not spec.is_block:
        raise ValueError(f"{spec} is not block low rank")
    cut = spec.with_ranks((min(rank, *spec.ranks),))
    slices = [
        core.narrow(names.index("r1"), 0, cut.ranks[0])
        for core, names in zip(cores, spec.cores, strict=True)
    ]
    return cut, stored_cores(cut, slices, cores[0].dtype)


def wanted_ranks(
    row_modes: Sequence[int], column_modes: Sequence[int], ranks: int | Sequence[int] | None
) -> tuple[int, ...]:
    """One upper limit a bond."""
    largest = max_ranks(row_modes, column_modes)
    if ranks is None:
        return largest
    wanted = (ranks,) * len(largest) if isinstance(ranks, int) else tuple(ranks)
    if len(wanted) != len(largest) or any(rank < 1 for rank in wanted):
        raise ValueError(
            f"{len(largest) + 1} cores have {len(largest)} inner ranks of at least 1, got {ranks}"
        )
    return tuple(min(pair) for pair in zip(wanted, largest, strict=True))


def stored_cores(spec: TTSpec, cores: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Own, contiguous tensors in the shapes of the spec: a slice would keep the whole SVD alive."""
    return [
        core.reshape(shape).to(dtype, memory_format=torch.contiguous_format, copy=True)
        for core, shape in zip(cores, spec.core_shapes, strict=True)
    ]
