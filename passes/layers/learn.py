"""Statistics and curves of every weight, layer by layer, of a model larger than memory.

All batches go through the blocks one after the other, and what arrives at each is kept on disk.
Then the probes of the loss come back the same way: a block is run again on what arrived there, the
gradient at what it gave goes through it, the moments of its weights become curves, and the gradient
at what arrived is kept for the block before. Draws, products and sums are those of an analysis of
the whole model, in the same order: so are the bits.

Where masks hide rows, ``count.py`` has found which rows count before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.tensors import give_back
from tensorize.ir.sites import Batch, Site
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.layers.chain import Back, Part, check_apart
from tensorize.passes.layers.count import both, masks_of
from tensorize.passes.layers.gradients import drop_all, has_all, keep_gradient, towards
from tensorize.passes.layers.layers import Layers, Place, fitted_loss, used_in, wanted_in
from tensorize.passes.layers.work import Work
from tensorize.passes.observe.backward import Probed, probing
from tensorize.passes.observe.gathering import Gathering, Masks, Wanted, probes_for
from tensorize.passes.observe.loss import LossOption, PreservedLoss
from tensorize.passes.observe.outputs import samples_of
from tensorize.passes.stages import Found, Learned, Observed

_PROBES = "probes"


@dataclass(frozen=True)
class LearnInLayers:
    """Learns the curves of all weights, from those of the layers' batches whose places are
    ``learnt``.

    Curves that the store of ``spectra`` has kept are not made again.
    """

    layers: Layers
    learnt: tuple[int, ...]
    spectra: ComputeSpectra
    loss_fn: LossOption = None
    most_probes: int = 4
    name: str = "curves"

    def run(self, found: Found) -> Learned:
        check_apart(self.layers.chain, found.free)
        spectra = self.spectra.kept(found)
        known, begun = frozenset(spectra), time.perf_counter()
        if len(known) < len(found.free):
            self.layers.run(found.progress)
            sweep = _Sweep(self, found, spectra)
            sweep.run()
            spectra = sweep.spectra
        last = [site for site in found.free if site.name not in known]
        found = replace(found, notes=(*found.notes, *self._told()))
        learned = self.spectra.learned(found, spectra, last, begun)
        counted = f"{self.layers.count} layers of weights"
        summary = f"{counted}, {len(known)} kept by an earlier run; {learned.summary}"
        return replace(learned, summary=summary)

    def _told(self) -> tuple[str, ...]:
        """What was said of the weights of all parts."""
        work = self.layers.work
        probes, notes = work.noted(_PROBES), list[str]()
        for part in (None, *range(self.layers.count)):
            notes += _notes_of(work, part)
        first = [probes["note"]] if probes and probes["note"] else []
        return (*first, *sorted(notes))


@dataclass(frozen=True)
class _Probes:
    """What the outputs say to all parts: their rows, how often batches are probed, and the samples
    of every batch."""

    rows: int
    count: int
    samples: list[int | None]
    note: str | None = None


@dataclass
class _Sweep:
    """The way back through the layers."""

    given: LearnInLayers
    found: Found
    spectra: dict[str, Spectrum]
    _done: int = 0

    @property
    def layers(self) -> Layers:
        return self.given.layers

    def run(self) -> None:
        layers, work = self.layers, self.layers.work
        todo = self._todo(None)
        outer = Gathering(self.found, {site.name for site in todo})
        probes = work.noted(_PROBES)
        known = None if probes is None else _Probes(**probes)
        if known is None or todo:
            with layers.outer() as (_, back):
                known = self._back(back, outer)
            work.note(_PROBES, vars(known))
        reached = next((k for k in range(layers.count) if self._has_gradients(k, known)), None)
        for k in reversed(range(layers.count)):
            todo_here = self._todo(k)
            if todo_here or reached is None or k < reached:
                self._block(k, todo_here, known)
            else:
                self._done += known.count * len(self.given.learnt)
            self._drop_gradients(k + 1, known)
        if todo:
            with layers.outer() as (front, back):
                self._front(front, back, outer, known)
            self._learn(None, outer, todo, known)
        self._drop_gradients(0, known)

    def _todo(self, part: int | None) -> list[Site]:
        return [
            site
            for site in self.found.free
            if self.layers.chain.part_of(site.name) == part and site.name not in self.spectra
        ]

    # ------------------------------------------------------------------------------- the outputs

    def _back(self, back: Back, gathering: Gathering) -> _Probes:
        """Probe the outputs of all batches; keep the gradients at what the last block gave."""
        layers = self.layers
        if self.found.metric != "loss":
            return _Probes(0, 1, [None] * len(layers.batches))
        wanted = wanted_in(layers.chain, None, gathering.free)
        return self._probe(back, gathering, wanted, fitted_loss(layers, back, self.given.loss_fn))

    def _probe(
        self,
        back: Part,
        gathering: Gathering,
        wanted: Wanted,
        loss: PreservedLoss,
    ) -> _Probes:
        layers, learnt = self.layers, self.given.learnt
        model, batches = layers.chain.model, layers.batches
        generator = torch.Generator().manual_seed(self.found.seed)
        gathering.look(back, layers.outputs_from(learnt[0]), wanted)
        samples: list[int | None] = [None] * len(batches)
        rows, probes, number = 0, 1, 0
        while number < probes:
            for j in learnt:
                made = probing(loss, batches[j], model, generator)

                def probe(result: Any, j: int = j, made: Callable[[Any], Probed] = made) -> Probed:
                    samples[j] = samples_of(result, model)
                    return made(result)

                call_, masks = layers.outputs_from(j), self._rows_of("back", j)
                own = gathering.add_gradients(back, call_, wanted, masks, probe)
                rows += own if number == 0 else 0
                keep_gradient(layers.work, _gradient(layers.count, number, j), back)
            if number == 0:
                probes = probes_for(rows, self.given.most_probes)
            number += 1
        return _Probes(rows * probes, probes, samples, loss.note)

    # -------------------------------------------------------------------------------- the layers

    def _block(self, k: int, todo: Sequence[Site], probes: _Probes) -> None:
        gathering = Gathering(self.found, {site.name for site in todo})
        with self.layers.block(k) as block:
            wanted = wanted_in(self.layers.chain, k, gathering.free)
            self._gather(block, k, gathering, wanted, probes, partial(self.layers.inputs, k))
        self._learn(k, gathering, todo, probes)

    def _front(self, front: nn.Module, back: Part, gathering: Gathering, probes: _Probes) -> None:
        layers, inputs = self.layers, self.layers.arguments
        wanted = wanted_in(layers.chain, None, gathering.free)
        if self.found.metric != "loss":
            self._gather(back, "back", gathering, wanted, probes, layers.outputs_from)
        elif wanted := used_in(front, inputs(0), wanted):
            self._gather(front, "front", gathering, wanted, probes, inputs)

    def _gather(
        self,
        part: nn.Module,
        place: Place,
        gathering: Gathering,
        wanted: Wanted,
        probes: _Probes,
        inputs: Callable[[int], Batch],
    ) -> None:
        """Add all runs of a part to the moments of its weights; gradients go on."""
        learnt, loss, work = self.given.learnt, self.found.metric == "loss", self.layers.work
        if loss and wanted:
            gathering.look(part, inputs(learnt[0]), wanted)
        total = (self.layers.count + 1) * probes.count * len(learnt)
        for number in range(probes.count):
            for j in learnt:
                self.found.progress("statistics", self._done, total)
                self._done += 1
                given = part, inputs(j), wanted, self._rows_of(place, j)
                if loss:
                    after = place + 1 if isinstance(place, int) else 0
                    scalar = towards(work, _gradient(after, number, j))
                    probe = partial(_probed, scalar, probes.samples[j])
                    gathering.add_gradients(*given, probe)
                    if isinstance(part, Part) and isinstance(place, int):
                        keep_gradient(work, _gradient(place, number, j), part)
                elif wanted:
                    gathering.add_inputs(*given)
                give_back()

    def _learn(
        self, part: int | None, gathering: Gathering, todo: Sequence[Site], probes: _Probes
    ) -> None:
        """Turn moments into curves, each kept as soon as it is made."""
        found, work = self.found, self.layers.work
        observed = gathering.observed(probes.rows, probes.count, len(self.given.learnt))
        notes = {*_notes_of(work, part), *observed.notes[len(found.notes) :]}
        work.note(_told(part), {"notes": sorted(notes)})
        met = {"few": observed.few, "unforeseen": observed.unforeseen}
        moved = found.to(Observed, statistics=observed.statistics, **met)
        self.spectra = self.given.spectra.curves(moved, todo, self.spectra)

    # ----------------------------------------------------------------- what goes to the part before

    def _rows_of(self, place: Place, j: int) -> Masks:
        masks = masks_of(self.layers, place, j)
        if place == "back" and self.found.metric != "loss":  # its runs go through the front as well
            masks = both(masks, masks_of(self.layers, "front", j))
        return lambda name, number: masks.get(name, {}).get(number)

    def _has_gradients(self, k: int, probes: _Probes) -> bool:
        return has_all(self.layers.work, self._names(k, probes))

    def _drop_gradients(self, k: int, probes: _Probes) -> None:
        drop_all(self.layers.work, self._names(k, probes))

    def _names(self, k: int, probes: _Probes) -> list[str]:
        """Of what goes from the k-th block to the one before."""
        if self.found.metric != "loss":
            return []
        return [_gradient(k, p, j) for p in range(probes.count) for j in self.given.learnt]


def _probed(scalar: Callable[[Any], Tensor], samples: int | None, result: Any) -> Probed:
    return Probed(scalar(result), 0, samples)


def _gradient(k: int, number: int, j: int) -> str:
    return f"gradient-{k:04}-{number}-{j:05}"


def _told(part: int | None) -> str:
    return "told-outer" if part is None else f"told-{part:04}"


def _notes_of(work: Work, part: int | None) -> Sequence[str]:
    """What was said of a part's weights so far."""
    said = work.noted(_told(part))
    return said["notes"] if said else ()
