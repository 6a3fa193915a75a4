"""FLOPs and bytes of a weight in a format, from its shape and uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tensorize.formats.registry import format_of
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.orders.by_time import timed_plan


def element_size(site: Site) -> int:
    return torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()


def dense_flops(site: Site) -> int:
    """FLOPs of one input row of every use of the dense weight; a lookup costs none.

    A product of two complex numbers is four of real ones.
    """
    m, n = site.matrix if len(site.shape) >= 2 else (1, site.parameters)
    return sum(2 * m * n * site.reals**2 for use in site.uses if use.contract != "lookup")


def flops_of_uses(
    sites: Sequence[Site], specs: Mapping[str, Spec | None], machine: Machine = GENERIC
) -> int:
    """FLOPs of all uses, each of as many rows as were seen of it; dense where there is no spec."""
    total = 0
    for site in sites:
        spec = specs.get(site.name)
        for use in site.uses:
            if not use.rows:
                continue
            alone, counts = replace(site, uses=(use,)), (use.rows,)
            row = dense_flops(alone) if spec is None else spec_flops(alone, spec, counts, machine)
            total += use.rows * use.groups * row
    return total


def spec_flops(
    site: Site, spec: Spec, batch_sizes: Sequence[int], machine: Machine = GENERIC
) -> Any:
    """FLOPs of one input row through the cores, in the order that runs, the worst batch size's."""
    form, total = format_of(spec), 0
    for use in site.uses:
        if form.planned and use.contract != "lookup":
            assert isinstance(spec, TTSpec)
            # A CPU may multiply halves in float32, and then the order is that one's.
            kinds = dict.fromkeys((site.dtype, "float32"))
            plans = [timed_plan(spec.plain, use.contract, machine, dtype=kind) for kind in kinds]
            total += max(-(-p.flops(batch) // batch) for p in plans for batch in batch_sizes)
        else:
            run = spec.plain if use.convolves else spec
            total = total + format_of(run).flops(run, use.contract)
    return total * site.reals**2
