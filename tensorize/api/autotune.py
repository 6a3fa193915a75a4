"""Time the best few contraction orders of a model's trains, and keep the fastest."""

from __future__ import annotations

import torch

from tensorize.base.tensors import device_of
from tensorize.codegen.machine import rates as machine
from tensorize.codegen.machine import timed_orders
from tensorize.ir.orders import Tree
from tensorize.passes.orders.by_time import contenders
from tensorize.passes.stages import Rewritten
from tensorize.weight import whole_model
from tensorize.weight.contractions import Asked, contractions
from tensorize.weight.install import factored
from tensorize.weight.precision import multiplied_in
from tensorize.weight.whole_model import settle


def time_orders(done: Rewritten) -> None:
    """Time the best few orders of every train of a model, keep the fastest, and use them."""
    contracts = {
        site.name: {use.contract for use in site.uses if use.contract in ("columns", "rows")}
        for site in done.sites
    }
    device, found = device_of(done.model), {}
    breakpoints = whole_model.breakpoints(done.model)
    asked = {
        Asked(w.spec.plain, contract, device, multiplied_in(w.dtype, device), breakpoints)
        for name, w in factored(done.model)
        for contract in contracts.get(name, ())
        if w.format.planned
    }
    for count, each in enumerate(sorted(asked, key=str)):
        done.progress("timing orders", count, len(asked))
        found |= fastest_orders(each)
    done.progress("timing orders", len(asked), len(asked))
    timed_orders.remember(found, device)
    contractions.cache_clear()
    settle(done.model)


def fastest_orders(asked: Asked) -> dict[str, tuple[Tree, int]]:
    """For each range of rows the fastest of the best few orders and its layout, by what is asked
    for where they are kept."""
    rates = machine.current(asked.device)
    tried = contenders(asked.spec, asked.contract, rates, asked.breakpoints, asked.dtype)
    found = {}
    dtype = getattr(torch, asked.dtype)
    for question, batches, plans in tried:
        (best,) = timed_orders.fastest(plans, batches, dtype, asked.device).pieces
        found[question] = best.tree, best.layout
    return found
