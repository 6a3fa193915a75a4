"""What was done to a model, as its report: every weight, the totals, and what turned out slow.

Where the model is ruined it says what other budgets of the same analysis give.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tensorize.api.analysis import Analysis
from tensorize.base import printer
from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import RUINED, Plan, Prediction, Totals
from tensorize.ir.precision import INTEGERS, Precision
from tensorize.ir.sites import Site
from tensorize.passes.allocate.candidates import other_costs
from tensorize.passes.allocate.flops import element_size, flops_of_uses
from tensorize.passes.allocate.forms import spec_of
from tensorize.passes.allocate.inputs import meets_rows
from tensorize.passes.allocate.slower import slow_choices
from tensorize.passes.curves.precisions import integers
from tensorize.passes.stages import Analysed, Rewritten
from tensorize.reports.attach import samples_of
from tensorize.reports.curve import Curve
from tensorize.reports.data import ReportTotals, SiteReport
from tensorize.reports.report import Report
from tensorize.reports.verdict import NOTHING_KNOWN, WANTED_LOSSES, Bits, Nearest, Outlook
from tensorize.version import __version__
from tensorize.weight.install import factored
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.whole_model import numbers

Timed = Callable[[FactoredWeight, Site, int], tuple[float, float]]
"""Microseconds of what uses a factorized weight, and of that with the dense one, for so many
rows."""

_MOST_TIMED = 4
"""Weights that are timed, of those that are slower than dense."""


def report_of(
    done: Rewritten,
    curve: Curve | None = None,
    notes: Sequence[str] = (),
    outlook: Outlook = NOTHING_KNOWN,
) -> Report:
    """What was done to a model, with ``notes`` beside those of the way there."""
    plan = done.plan
    aliases = {site.name: site.aliases for site in done.sites}
    sites = tuple(
        SiteReport.of(choice, aliases.get(choice.name, ()), done.errors.get(choice.name, 0.0))
        for choice in plan.sites
    )
    return Report(
        plan=plan,
        sites=sites,
        totals=ReportTotals(
            plan.dense,
            totals_of(done.model, plan.predicted),
            packed_bytes(done),
            image_flops(done),
        ),
        curve=curve,
        history=done.history,
        notes=tuple(dict.fromkeys((*done.notes, *plan.notes, *notes))),
        environment=_environment(),
        weights=samples_of(done.model),
        outlook=outlook,
    )


def totals_of(model: nn.Module, predicted: Prediction) -> Totals:
    """Parameters and bytes of a model, each once, and of indices; FLOPs and times are predicted."""
    indices = (index for _, weight in factored(model) for index in weight.indices)
    held = {id(tensor): tensor for tensor in (*model.parameters(), *indices)}
    return Totals(
        numbers(model),
        sum(tensor.nbytes for tensor in held.values()),
        predicted.flops,
        predicted.latency,
    )


def image_flops(done: Rewritten) -> tuple[int, int] | None:
    """FLOPs of an image before and after, where outputs have a row for each; None elsewhere, and
    where weights share a factor."""
    images = 0 if done.predictor is None else done.predictor.images
    specs = {choice.name: choice.spec for choice in done.plan.sites}
    if not images or any(choice.shared for choice in done.plan.sites):
        return None
    both = (flops_of_uses(done.sites, each, done.machine) for each in ({}, specs))
    before, after = (round(flops / images) for flops in both)
    return before, after


def packed_bytes(done: Rewritten) -> int:
    """What a CPU holds beside a model, once all of its weights have run."""
    specs = {choice.name: choice.spec for choice in done.plan.sites}
    each = ((specs[site.name], meets_rows(site)) for site in done.sites)
    return sum(spec.packed_bytes(contracts) for spec, contracts in each if spec is not None)


def _environment() -> tuple[tuple[str, str], ...]:
    return (
        ("tensorize", __version__),
        ("torch", str(torch.__version__)),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()} {platform.system()}"),
        ("threads", str(torch.get_num_threads())),
    )


def slow_weights(done: Rewritten, timed: Timed) -> tuple[str, ...]:
    """Notes on weights that are slower than dense; of each shape one is ``timed``."""
    plan = done.plan
    slow = slow_choices(done.sites, plan.sites, plan.batch_sizes, done.machine)
    alike: dict[Any, list[str]] = {}
    for choice in plan.sites:
        if choice.name in slow:
            alike.setdefault((choice.shape, choice.spec), []).append(choice.name)
    weights, sites = dict(factored(done.model)), {site.name: site for site in done.sites}
    notes = []
    for names in alike.values():
        worst = max(slow[names[0]], key=lambda each: each.factorized / each.dense)
        found, site = weights[names[0]], sites[names[0]]
        said = _both("predicted", worst.factorized, worst.dense)
        if len(notes) < _MOST_TIMED and len(found.shape) == 2 and not found.is_meta:
            said += f"; {_both('measured', *timed(found, site, worst.batch))}"
        others = f" and {len(names) - 1} like it" if len(names) > 1 else ""
        rows = printer.plural(worst.batch, "row")
        why = ", rebuilt from its factors at every call" if site.last_resort else ""
        notes.append(f"{names[0]}{others}: slower than dense at {rows}{why}: {said}")
    return tuple(notes)


def _both(how: str, factorized: float, dense: float) -> str:
    ours, own = (printer.seconds(1e-6 * time) for time in (factorized, dense))
    return f"{ours} {how}, {own} dense"


def outlook_of(
    plan: Plan, analysis: Analysis, try_bits: Callable[[Precision], float] | None = None
) -> Outlook:
    """What the report of a plan says beside it.

    ``try_bits``: what the dense model loses with weights of a precision; asked where it is ruined.
    """
    predictor, bits = analysis.program.predictor, bool(integers(analysis.precision))
    if predictor is None:
        return NOTHING_KNOWN
    known = Outlook(
        predictor.unit, predictor.text_loss, in_bytes=bits, row=predictor.row,
        sufficiency=predictor.sufficiency,
    )  # fmt: skip
    lost, limit = plan.predicted.loss, RUINED.get(predictor.unit)
    if lost is None or limit is None or lost <= limit:
        return known
    nearest = tuple(_nearest(plan, analysis, bits))
    if bits:
        return replace(known, nearest=nearest)
    if try_bits is not None:
        return replace(known, nearest=nearest, bits=_tried_bits(analysis.program, try_bits))
    most = plan.predicted.bytes / max(plan.dense.bytes, 1)
    return replace(known, nearest=nearest, bits=_bits(analysis.program, most))


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


def _tried_bits(analysed: Analysed, try_bits: Callable[[Precision], float]) -> Bits | None:
    """The fewest bits that lose no more than is wanted, else the most that there are."""
    found = None
    for name, share in sorted(_sizes(analysed), key=lambda each: each[1]):
        found = Bits(name, share, try_bits(INTEGERS[name]))
        if found.loss is not None and found.loss <= max(WANTED_LOSSES):
            break
    return found


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
