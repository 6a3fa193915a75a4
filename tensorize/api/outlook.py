"""What a plan means, and where it ruins the model, what other budgets of its analysis give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from tensorize.api.analysis import Analysis
from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.ir.precision import INTEGERS
from tensorize.passes.allocate.candidates import other_costs
from tensorize.passes.allocate.flops import element_size
from tensorize.passes.allocate.forms import spec_of
from tensorize.passes.curves.precisions import integers
from tensorize.passes.stages import Analysed
from tensorize.reports.verdict import NOTHING_KNOWN, RUINED, WANTED_LOSSES, Bits, Nearest, Outlook


def outlook_of(plan: Plan, analysis: Analysis) -> Outlook:
    """What the report of a plan says beside it. Nothing new is learned of the model for it."""
    predictor, bits = analysis.program.predictor, bool(integers(analysis.precision))
    if predictor is None:
        return NOTHING_KNOWN
    known = Outlook(predictor.unit, predictor.text_loss, in_bytes=bits)
    lost, limit = plan.predicted.loss, RUINED.get(predictor.unit)
    if lost is None or limit is None or lost <= limit:
        return known
    most = plan.predicted.bytes / max(plan.dense.bytes, 1)
    not_tried = None if bits else _bits(analysis.program, most)
    return replace(known, nearest=tuple(_nearest(plan, analysis, bits)), bits=not_tried)


def _nearest(plan: Plan, analysis: Analysis, bits: bool) -> Iterator[Nearest]:
    for loss in WANTED_LOSSES:
        try:
            found = analysis.predicted(Budget(loss=loss), plan.refine)
        except BudgetError:  # what may be compressed loses more at any rank
            continue
        size, whole = found.parameters, plan.dense.parameters
        if bits:
            size, whole = found.bytes, plan.dense.bytes
        # Up, in digits that are short to write: as much is kept at least.
        share = math.ceil(1e3 * size / whole) / 1e3
        if share < 1:
            yield Nearest(loss, share)


def _bits(analysed: Analysed, most: float) -> Bits | None:
    """The most bits of all weights within a share of the bytes; the fewest where none fit."""
    sizes = dict(_sizes(analysed))
    fitting = {name: share for name, share in sizes.items() if share <= most}
    if not sizes:
        return None
    name = max(fitting, key=fitting.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)
    return Bits(name, sizes[name])


def _sizes(analysed: Analysed) -> Iterator[tuple[str, float]]:
    free = {site.name for site in analysed.free}
    if not free:
        return
    whole = sum(size for _, size in analysed.sizes.values())
    rest = float(other_costs(analysed)[1])
    rest += sum(s.parameters * element_size(s) for s in analysed.sites if s.name not in free)
    for name in INTEGERS:
        taken = (
            spec_of(site, 0, False, name).bytes(element_size(site), len(site.names))
            for site in analysed.free
        )
        yield name, (rest + sum(taken)) / whole
