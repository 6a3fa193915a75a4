"""The decompositions of one weight in a metric: its singular values, and its best factors.

With R = L_R L_Rᵀ and K = L_K L_Kᵀ the best rank-r approximation in the metric is the truncated SVD
of the whitened weight L_Rᵀ W L_K, mapped back (Eckart-Young). One eigendecomposition of its smaller
Gram matrix gives every rank at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorize.algebra.metric import Metric, solve_root
from tensorize.base.tensors import at_work, doubled

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


def exact_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U (M, k) and V (k, N), k = min(M, N), with U V = W to rounding."""
    m, n = weight.shape[-2:]
    exact = doubled(weight)
    basis = gram_eigenvectors(exact, min(m, n))[0]
    if n <= m:
        return exact @ basis, basis.mH
    return basis, basis.mH @ exact


def singular_squares(weight: Tensor, pay: int, metric: Metric | None = None) -> Tensor:
    """All σ² of the whitened W, descending.

    From the smaller Gram matrix, several times faster than from W. That loses what is below
    sqrt(eps) of the largest singular value, so without a metric it is taken in the weight's own
    precision only where the energy beyond rank ``pay`` survives that, else in float64, and where
    that is not enough W itself is decomposed.
    """
    return _decomposed(weight, pay, metric, vectors=False)[1]


def best_factors(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The best U (…, M, rank) and V (…, rank, N) in one metric, at least in float32.

    The first r components are the best of rank r.
    """
    m, n = weight.shape[-2:]
    work = at_work(weight)
    basis = gram_eigenvectors(work, rank, metric)[0][..., :rank]
    # The weight meets only the small matrix that is final: its error is that of its own dtype.
    if n <= m:  # W̃ V Vᵀ with V (N, r): U = L_R⁻ᵀ W̃ V = W L_K V, V = Vᵀ L_K⁻¹
        left = work @ left_times(metric.right, basis).to(work.dtype)
        right = solve_root(metric.right, basis).mH
    else:  # Q Qᵀ W̃ with Q (M, r): U = L_R⁻ᵀ Q, V = Qᵀ L_Rᵀ W
        left = solve_root(metric.left, basis)
        right = left_times(metric.left, basis).mH.to(work.dtype) @ work
    return _balanced(left.to(work.dtype), right.to(work.dtype))


def gram_eigenvectors(
    weight: Tensor, pay: int, metric: Metric | None = None
) -> tuple[Tensor, Tensor]:
    """Right (N ≤ M) or left singular vectors of the whitened W, and ``singular_squares``."""
    found, squares = _decomposed(weight, pay, metric, vectors=True)
    assert found is not None
    return found, squares


def _decomposed(
    weight: Tensor, pay: int, metric: Metric | None, *, vectors: bool
) -> tuple[Tensor | None, Tensor]:
    m, n = weight.shape[-2:]
    metric = metric or Metric(1.0, None, None)
    oriented, matrix = (metric, weight) if n <= m else (metric.transposed(), weight.mH)
    found: tuple[Tensor | None, Tensor] | None = None
    exact = torch.promote_types(weight.dtype, torch.float64)
    own = metric.plain or oriented.mixes_rows  # where less than float64 is less work
    for dtype in dict.fromkeys((weight.dtype, exact) if own else (exact,)):
        # Where rows do not mix, some of them at a time are taken to float64.
        at_dtype = matrix.to(dtype) if own else matrix
        gram = at_dtype.mH @ at_dtype if metric.plain else oriented.gram(at_dtype)
        try:
            if vectors:
                values, basis = torch.linalg.eigh(gram)
            else:
                values, basis = torch.linalg.eigvalsh(gram), None
        except _LinAlgError:
            continue  # squares that overflow, or a solver that does not converge
        values = values.flip(-1).clamp_min(0)
        found = None if basis is None else basis.flip(-1), values
        tail = values[..., pay:].sum(-1) if pay < values.shape[-1] else values[..., -1]
        share = tail / values.sum(-1).clamp_min(1e-300)
        if bool((share > _noise(dtype, metric)).all()):
            return found
    white = metric.whiten(weight)
    try:
        if not vectors:
            return None, torch.linalg.svdvals(white).square()
        left, sigma, right = torch.linalg.svd(white, full_matrices=False)
    except _LinAlgError:
        if found is None:
            raise
        return found  # the float64 Gram is right to sqrt(eps) of the largest
    return (right.mH if n <= m else left), sigma.square()


def _noise(dtype: torch.dtype, metric: Metric) -> float:
    """The share of the energy from which on a tail has four digits.

    The rounding of a Gram matrix is about eps of the whole. Where only L_Rᵀ W is made in a lower
    precision, its rounding E shifts σ² by 2 σ uᵀE v, with random signs, and adds ‖E‖² = eps² of the
    whole.
    """
    eps, exact = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    return max(1e4 * exact, 1e4 * eps if metric.plain else 1e6 * eps**2)


def left_times(root: Tensor | None, basis: Tensor) -> Tensor:
    """L B."""
    if root is None:
        return basis
    root = root.to(basis)
    return root.unsqueeze(-1) * basis if root.dim() == 1 else root @ basis


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Each component's two vectors brought to the same length, in place.

    Laid out as they are once they were kept on disk: how a matmul rounds hangs on it.
    """
    a, b = left.norm(dim=-2), right.norm(dim=-1)
    ratio = (b / a.clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()
    left.mul_(ratio.unsqueeze(-2))
    right.div_(ratio.unsqueeze(-1))
    return left.contiguous(), right.contiguous()
