"""Statistics and curves of a few weights at a time, so that memory is bounded and work is kept.

Second moments take the most memory of an analysis: a number for each pair of inputs, and of
outputs, of every weight. In groups whose moments fit, each group costs the passes over the
calibration data that all weights take together, and gives the same bits: its gradients come on the
same way. As soon as a group's moments are there they become curves, which a store keeps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorize.base import printer
from tensorize.base.errors import MemoryLimitError
from tensorize.ir.sites import Site
from tensorize.passes.curves.side_by_side import notes_of_all, own_share
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.observe.moments import has_moments, moment_bytes
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.stages import Found, Learned, Observed


@dataclass(frozen=True)
class LearnInGroups:
    """Learns curves of groups of weights whose second moments take ``max_bytes``.

    None: all that have no curve yet are one group. Curves that the store of ``spectra`` has kept
    are not made again. Where processes share the work, each collects the moments that its own
    curves are made of.

    Raises:
        MemoryLimitError: the moments of a single weight take more.
    """

    statistics: CollectStatistics
    spectra: ComputeSpectra
    max_bytes: int | None = None
    name: str = "curves"

    def run(self, found: Found) -> Learned:
        spectra = self.spectra.kept(found)
        kept = len(spectra)
        todo = [site for site in found.free if site.name not in spectra]
        groups = groups_that_fit(todo, found.metric, self.max_bytes)
        notes, last, begun = found.notes, (), time.perf_counter()
        for last in groups:
            names = frozenset(site.name for site in own_share(last))
            observed = found.to(Observed, statistics={})
            if any(has_moments(site, found.metric) for site in last):
                observed = replace(self.statistics, only=names).run(found)
            notes += notes_of_all(observed.notes[len(found.notes) :])
            begun = time.perf_counter()
            spectra = self.spectra.curves(observed, last, spectra)
        learned = self.spectra.learned(replace(found, notes=notes), spectra, last, begun)
        counted = f"{len(groups)} group{'s' * (len(groups) != 1)} of weights"
        summary = f"{counted}, {kept} kept by an earlier run; {learned.summary}"
        return replace(learned, summary=summary)


def groups_that_fit(
    sites: Sequence[Site], metric: str, max_bytes: int | None
) -> list[tuple[Site, ...]]:
    """Weights in the order of their names, cut where the moments of one more would not fit.

    Of a moment one triangle is held; while a batch is added there is what it adds, which is whole.
    Room is left for it.

    Raises:
        MemoryLimitError: a single weight does not fit.
    """
    if max_bytes is None or metric == "frobenius":
        return [tuple(sites)] if sites else []
    groups: list[list[Site]] = []
    held = largest = 0
    for site in sorted(sites, key=lambda site: site.name):
        own = moment_bytes(site, metric) if has_moments(site, metric) else 0
        if 3 * own > max_bytes:
            raise MemoryLimitError(
                f"its second moments take {printer.bytes_(3 * own)}, and max_memory is "
                f"{printer.bytes_(max_bytes)}",
                site=site.name,
                way_out=f"max_memory={3 * own}, or exclude it",
            )
        if not groups or held + own + 2 * max(largest, own) > max_bytes:
            groups.append([])
            held = largest = 0
        groups[-1].append(site)
        held, largest = held + own, max(largest, own)
    return [tuple(group) for group in groups]
