"""FLOPs and bytes of a weight in a format, from its shape and uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tensorize.ir.sites import Site
from tensorize.ir.spec import BLOCK, LOW_RANK, TTSpec
from tensorize.passes.orders.by_flops import plan_contraction


def element_size(site: Site) -> int:
    return torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()


def dense_flops(site: Site) -> int:
    """FLOPs of one input row of every use of the dense weight; a lookup costs none."""
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    return sum(2 * m * n for use in site.uses if use.contract != "lookup")


def spec_flops(site: Site, spec: TTSpec, batch_sizes: Sequence[int]) -> int:
    """FLOPs of one input row through the cores, the worst over the batch sizes."""
    if spec.format == LOW_RANK:
        (rank,) = spec.ranks
        return low_rank_flops(site, rank)
    total = 0
    for use in site.uses:
        if use.contract == "lookup":
            total += _lookup_flops(spec)
            continue
        plan = plan_contraction(spec, use.contract)
        total += max(-(-plan.flops(batch) // batch) for batch in batch_sizes)
    return total


def low_rank_flops(site: Site, rank: Any) -> Any:
    """FLOPs of one input row of every use at a rank, or at each of an array of them."""
    m, n = site.matrix
    total = 0 * rank
    for use in site.uses:
        if use.contract == "whole":  # rebuilt at every call, one row being the worst
            total = total + 2 * rank * m * n + 2 * m * n
        else:
            total = total + 2 * rank * (n if use.contract == "lookup" else m + n)
    return total


def _lookup_flops(spec: TTSpec) -> int:
    if spec.format == BLOCK:
        return 2 * spec.ranks[0] * spec.shape[-1]
    flops, columns = 0, spec.column_modes[0]
    for k, rank in enumerate(spec.ranks):
        after = spec.ranks[k + 1] if k + 1 < len(spec.ranks) else 1
        flops += 2 * columns * rank * spec.column_modes[k + 1] * after
        columns *= spec.column_modes[k + 1]
    return flops
