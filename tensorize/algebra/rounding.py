"""Recompress a tensor train to smaller ranks (TT-rounding, Oseledets 2011)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorize.algebra.decompose import stored_cores, wanted_ranks
from tensorize.algebra.reconstruct import check_cores
from tensorize.algebra.svd import check_finite, computable, svd
from tensorize.ir.spec import TTSpec


def round_tt(
    spec: TTSpec, cores: Sequence[Tensor], ranks: int | Sequence[int] | None = None
) -> tuple[TTSpec, list[Tensor]]:
    """Lower the ranks of a tensor train (Oseledets 2011, algorithm 2) without building the matrix.

    A QR sweep from the right makes the cores right-orthogonal, an SVD sweep from the left truncates
    them. The error relative to the given train obeys the same bounds as that of ``tt_svd``.

    Args:
        spec: the factorization, without experts.
        cores: its cores, in ``spec.core_shapes``.
        ranks: one inner rank for all, or d-1 of them; larger ones are clipped. None: only those
            that no unfolding of that shape can have are lowered, which changes nothing but the
            gauge.

    Returns:
        The new spec and its cores, in the dtype of the given ones, with no gradient. All cores but
        the last are left-orthogonal.

    Raises:
        ValueError: cores do not fit the spec, the spec has experts, or the ranks make no sense.
        AnalysisError: a core holds NaN or infinity.
    """
    check_cores(spec, cores)
    if spec.batch:
        raise ValueError(f"{spec} has experts: round them one by one")
    if spec.is_block:
        raise ValueError(f"{spec} is no chain: its ranks are cut by cut_block")
    rows, columns, count = spec.row_modes, spec.column_modes, len(spec.cores)
    wanted = wanted_ranks(rows, columns, ranks)
    bonds = (1, *spec.ranks, 1)
    # Work on (left rank, modes, right rank).
    chain = [
        computable(core).reshape(bonds[k], rows[k] * columns[k], bonds[k + 1])
        for k, core in enumerate(cores)
    ]
    for core in chain:
        check_finite(core)
    for k in range(count - 1, 0, -1):
        _, modes, right = chain[k].shape
        q, r = torch.linalg.qr(chain[k].flatten(1).mT)
        chain[k] = q.mT.reshape(-1, modes, right)
        chain[k - 1] = chain[k - 1] @ r.mT
    found = []
    for k in range(count - 1):
        u, s, vh = svd(chain[k].flatten(0, 1))
        rank = min(wanted[k], s.numel())
        chain[k] = u[:, :rank].reshape(*chain[k].shape[:2], rank)
        carried = s[:rank, None] * vh[:rank]
        chain[k + 1] = (carried @ chain[k + 1].flatten(1)).reshape(rank, *chain[k + 1].shape[1:])
        found.append(rank)
    rounded = TTSpec(rows, columns, found)
    return rounded, stored_cores(rounded, chain, cores[0].dtype)
