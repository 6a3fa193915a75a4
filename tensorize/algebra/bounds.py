"""What a tensor train of given ranks loses at most, and at least, by the unfoldings' spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.algebra.modes import interleaved
from tensorize.algebra.svd import spectrum_of


def tails_of(singular_values: Tensor) -> Tensor:
    """Norms of what is discarded at rank 0, 1, …, k: (k + 1,), float64, the last one is 0."""
    return tails(singular_values.to(torch.float64).square()).sqrt()


def tails(squares: Tensor) -> Tensor:
    """What is lost at rank 0, 1, …, k, Σ of the squares beyond it: (k + 1,), the last one is 0."""
    # Summed from the smallest up, so that small tails keep their digits.
    sums = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


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
    tensor = interleaved(matrix, row_modes, column_modes)
    spectra, rows = [], 1
    for k in range(len(row_modes) - 1):
        rows *= row_modes[k] * column_modes[k]
        spectra.append(spectrum_of(tensor.reshape(rows, -1)))
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
    return [
        tails_of(s)[min(rank, s.numel())].item() for s, rank in zip(spectra, wanted, strict=True)
    ]
