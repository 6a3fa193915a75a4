"""FLOPs and bytes of a weight in a format, from its shape and uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tensorize.formats.registry import format_of
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.orders.by_time import common_breakpoints, most_flops, timed_plan


def element_size(site: Site) -> int:
    return torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()


def dense_flops(site: Site) -> int:
    """FLOPs of one input row of every use of the dense weight; a lookup costs none."""
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    return sum(2 * m * n for use in site.uses if use.contract != "lookup")


def spec_flops(
    site: Site, spec: Spec, batch_sizes: Sequence[int], machine: Machine = GENERIC
) -> Any:
    """FLOPs of one input row through the cores, the worst over the batch sizes.

    Where an order is planned, of the orders that may run the one with the most: which it is depends
    on the rest of the model.
    """
    form, total = format_of(spec), 0
    batches = tuple(batch_sizes)
    for use in site.uses:
        if form.planned and use.contract != "lookup":
            assert isinstance(spec, TTSpec)
            total += most_flops(spec, use.contract, machine, batches, site.dtype)
        else:
            total = total + form.flops(spec, use.contract)
    return total


def not_run(
    sites: Sequence[Site],
    choices: Sequence[RankPlan],
    batch_sizes: Sequence[int],
    machine: Machine,
) -> int:
    """By how much the FLOPs of a whole plan are fewer than those that its weights may need."""
    known = {site.name: site for site in sites}
    planned = [
        (known[choice.name], choice.spec)
        for choice in choices
        if isinstance(choice.spec, TTSpec) and format_of(choice.spec).planned
    ]
    turns = common_breakpoints(
        ((spec, side, site.dtype) for site, spec in planned for side in ("columns", "rows")),
        machine,
    )
    fewer = 0
    for site, spec in planned:
        for use in site.uses:
            if use.contract != "lookup":
                plan = timed_plan(spec, use.contract, machine, turns, site.dtype)
                fewer += most_flops(spec, use.contract, machine, tuple(batch_sizes), site.dtype)
                fewer -= max(-(-plan.flops(batch) // batch) for batch in batch_sizes)
    return fewer
