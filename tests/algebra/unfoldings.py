"""What the spectra of a matrix's unfoldings say of any tensor train of given ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.algebra.modes import interleaved


def unfolding_spectra(
    matrix: Tensor, row_modes: Sequence[int], column_modes: Sequence[int]
) -> list[Tensor]:
    """Singular values of each of the d-1 unfoldings of the interleaved matrix."""
    tensor = interleaved(matrix, row_modes, column_modes)
    spectra, rows = [], 1
    for k in range(len(row_modes) - 1):
        rows *= row_modes[k] * column_modes[k]
        spectra.append(torch.linalg.svdvals(tensor.reshape(rows, -1)))
    return spectra


def discarded(spectra: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Norms of the singular values that each unfolding loses: (d - 1,).

    No train of these ranks is closer than the largest of them (Eckart and Young 1936), and TT-SVD
    is at most as far as the root of the sum of their squares (Oseledets 2011, theorem 2.2).
    """
    lost = [s[rank:].norm() for s, rank in zip(spectra, ranks, strict=True)]
    return torch.stack(lost) if lost else torch.zeros(1)
