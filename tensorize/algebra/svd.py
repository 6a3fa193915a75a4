"""Singular value decompositions that do not fail on hard matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorize.base.errors import AnalysisError
from tensorize.base.tensors import doubled

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition that does not give up.

    LAPACK's divide and conquer fails to converge on some matrices that a different algorithm
    handles. Those are done by the eigendecomposition of the smaller Gram matrix in float64: leading
    singular values to full accuracy, those below about 1e-8 of the largest only to that level.

    Args:
        matrix: (m, n), at least float32.

    Returns:
        U of (m, k), the singular values of (k,) in non-increasing order, and Vᵀ of (k, n), with
        k = min(m, n), in the matrix's dtype.

    Raises:
        AnalysisError: the matrix holds NaN or infinity.
    """
    check_finite(matrix)
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except _LinAlgError:
        u, s, vh = _gram_svd(matrix)
    return u, s, vh


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition through eigh of the smaller Gram matrix, in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _gram_svd(matrix.mH)
        return vh.mH, s, u.mH
    tall = doubled(matrix)
    # Scaled, so that squaring neither overflows nor underflows.
    scale = tall.abs().amax() if tall.numel() else tall.abs().new_ones(())
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    tall = tall / scale
    _, vectors = torch.linalg.eigh(tall.mH @ tall)
    v = vectors.flip(-1)
    # The columns of A V are s u. QR instead of a division by s: U stays orthonormal where s is 0.
    q, r = torch.linalg.qr(tall @ v)
    diagonal = r.diagonal()
    s, order = diagonal.abs().sort(descending=True, stable=True)
    u = q * torch.where(diagonal == 0, 1.0, diagonal.sgn())
    dtype = matrix.dtype
    return u[:, order].to(dtype), (s * scale).to(dtype.to_real()), v[:, order].mH.to(dtype)


def tail_sums(squares: Tensor) -> Tensor:
    """What is lost at rank 0, 1, …, k, Σ of the squares beyond it: (k + 1,), the last one is 0."""
    # Summed from the smallest up, so that small tails keep their digits.
    sums = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def check_finite(matrix: Tensor) -> None:
    if not torch.isfinite(matrix).all():
        raise AnalysisError(
            "the matrix to decompose holds NaN or infinity",
            way_out="check the weight, or exclude its site",
        )


def computable(tensor: Tensor) -> Tensor:
    """Without gradient, and in a dtype that LAPACK has."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
