"""Weights with moments, their curves, and what a factorization of them loses by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import DENSE, LOW_RANK
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.metric import damped as shrunk
from tensorize.passes.curves.metric import shrinkage, site_metrics
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.observe.moments import Moments, Term

METRICS = ("frobenius", "input", "loss")
BOTH = (DENSE, LOW_RANK)


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(width: int, seed: int, diagonal: bool = False) -> Tensor:
    """A second moment whose eigenvalues span four decades."""
    rows = draw((3 * width, width), seed) * torch.logspace(0, -2, width, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(draw((width, width), seed + 1))[0]
    full = rows.t() @ rows / len(rows)
    return full.diagonal().clone() if diagonal else full


def site(m: int, n: int, experts: int = 0, uses: Sequence[Use] = ()) -> Site:
    shape = (experts, m, n) if experts else (m, n)
    return Site("layer.weight", shape, "float64", tuple(uses) or (Use("linear", "columns"),))


def paying(m: int, n: int) -> int:
    """The largest rank that saves parameters."""
    return max(1, (m * n - 1) // (m + n))


SAMPLES = 100


def term(contract: str, rows: Tensor | None, columns: Tensor | None, count: int) -> Term:
    """The moments of so many rows."""
    found = Term(contract, input_rows=count)
    found.add(rows, columns)
    return found


def moments_of(m: int, n: int, metric: str, *, diagonal: bool = False, seed: int = 1) -> Moments:
    if metric == "frobenius":
        return Moments()
    rows = moment(m, seed + 10, diagonal) if metric == "loss" else None
    return Moments({"columns": term("columns", rows, moment(n, seed + 20, diagonal), SAMPLES)})


def damped(moments: Tensor | None, width: int, samples: int) -> Tensor:
    if moments is None:
        return torch.eye(width, dtype=torch.float64)
    identity = torch.eye(width, dtype=torch.float64)
    if moments.dim() == 1:
        return moments.diag() + 0.05 * moments.mean() * identity
    return shrunk(moments, shrinkage(moments, samples))


def lost(delta: Tensor, moments: Moments, metric: str) -> float:
    """Σ over the terms of tr(R ΔW K ΔWᵀ), half of it in the loss metric; written out."""
    if not moments.terms:
        return float(delta.square().sum())
    total = 0.0
    for matrix in delta if delta.dim() == 3 else [delta]:
        for term in moments.terms.values():
            rows = damped(term.rows, matrix.shape[0], term.input_rows)
            columns = damped(term.columns, matrix.shape[1], term.input_rows)
            total += float((rows @ matrix * (matrix @ columns)).sum())
    return total / 2 if metric == "loss" else total


def whitened(weight: Tensor, moments: Moments, metric: str) -> Tensor:
    """R^½ W K^½ by eigendecomposition: not the roots that the code under test takes."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.mT

    if not moments.terms:
        return weight
    (term,) = moments.terms.values()
    rows, columns = (
        damped(t, w, term.input_rows)
        for t, w in zip((term.rows, term.columns), weight.shape[-2:], strict=True)
    )
    return root(rows) @ weight @ root(columns) * (0.5**0.5 if metric == "loss" else 1.0)


def curve(
    weight: Tensor, moments: Moments, metric: str, formats: tuple[str, ...] | None = BOTH
) -> Spectrum:
    experts = weight.shape[0] if weight.dim() == 3 else 0
    where = site(*weight.shape[-2:], experts)
    return spectrum(where, weight, site_metrics(where, moments, metric), formats)


# The roots of a metric are kept in float32.
ROOTS = 64 * torch.finfo(torch.float32).eps


def matches(found: float, expected: float, whole: float) -> bool:
    return abs(found - expected) <= ROOTS * (expected + 1e-6 * whole)


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    u, v = torch.linalg.qr(draw((m, n), seed))[0], torch.linalg.qr(draw((n, n), seed + 1))[0]
    return u * values @ v.mT
