"""Statistics and curves of every weight, layer by layer, of a model larger than memory.

All batches go through the blocks one after the other, and what arrives at each is kept on disk.
Then the probes of the loss come back the same way: a block is run again on what arrived there, the
gradient at what it gave goes through it, the moments of its weights become curves, and the gradient
at what arrived is kept for the block before. Draws, products and sums are those of an analysis of
the whole model, in the same order: so are the bits.

Where masks hide rows, what tells which rows count comes back the same way, before the gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.tensors import give_back
from tensorize.capture.forward import untouched
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch, Site
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.layers.chain import Back, Part, check_apart
from tensorize.passes.layers.layers import Layers, fitted_loss
from tensorize.passes.observe.backward import Probed, probing
from tensorize.passes.observe.counted import Counted, reached_rows, reading
from tensorize.passes.observe.gathering import Gathering, Masks, Wanted, probes_for
from tensorize.passes.observe.hidden import hides_rows
from tensorize.passes.observe.loss import LossOption, PreservedLoss, function_of
from tensorize.passes.observe.outputs import call, outputs_of, samples_of
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
        notes, few = self._told()
        last = [site for site in found.free if site.name not in known]
        found = replace(found, notes=(*found.notes, *notes), few=few)
        learned = self.spectra.learned(found, spectra, last, begun)
        counted = f"{self.layers.count} layers of weights"
        summary = f"{counted}, {len(known)} kept by an earlier run; {learned.summary}"
        return replace(learned, summary=summary)

    def _told(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """What was said of the weights of all parts, by their names."""
        work = self.layers.work
        few: dict[str, int] = {}
        probes, notes = work.noted(_PROBES), list[str]()
        for part in (None, *range(self.layers.count)):
            if told := work.noted(_told(part)):
                notes += told["notes"]
                few |= told["few"]
        first = [probes["note"]] if probes and probes["note"] else []
        return (*first, *sorted(notes)), few


@dataclass(frozen=True)
class _Probes:
    """What the outputs say to all parts: their rows, how often batches are probed, the samples of
    every batch, and which batches have rows that do not count."""

    rows: int
    count: int
    samples: list[int | None]
    masked: list[int]
    note: str | None = None


@dataclass
class _Sweep:
    """The way back through the layers."""

    given: LearnInLayers
    found: Found
    spectra: dict[str, Spectrum]
    _done: int = 0
    _masks: dict[int, Counted] = field(default_factory=dict)
    _of_back: dict[int, Counted] = field(default_factory=dict)

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

    def _wanted(self, part: int | None, gathering: Gathering) -> Wanted:
        chain = self.layers.chain
        return [
            (name, parameter)
            for name, parameter in chain.model.named_parameters()
            if name in gathering.free and chain.part_of(name) == part
        ]

    # ------------------------------------------------------------------------------- the outputs

    def _back(self, back: Back, gathering: Gathering) -> _Probes:
        """Probe the outputs of all batches; keep the gradients at what the last block gave."""
        layers, found, given = self.layers, self.found, self.given
        model, batches = layers.chain.model, layers.batches
        wanted = self._wanted(None, gathering)

        with torch.no_grad():
            first = call(back, layers.outputs_from(0))
            least = min(len(each.rows) for each in outputs_of(first, batches[0], model))
            del first
        loss_fn = function_of(given.loss_fn)
        everywhere = loss_fn is not None or layers.chain.most_rows > least
        masked = [j for j in given.learnt if everywhere or hides_rows(batches[j])]
        for j in masked:
            probe = reading(model, batches[j], loss_fn)
            self._count(back, None, j, layers.outputs_from(j), wanted, probe)
        self._of_back = dict(self._masks)
        if found.metric != "loss":
            return _Probes(0, 1, [None] * len(batches), masked)
        loss = fitted_loss(layers, back, given.loss_fn)
        return self._probe(back, gathering, wanted, loss, masked)

    def _probe(
        self,
        back: Part,
        gathering: Gathering,
        wanted: Wanted,
        loss: PreservedLoss,
        masked: list[int],
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

                call_ = layers.outputs_from(j)
                own = gathering.add_gradients(back, call_, wanted, self._rows_of(j), probe)
                rows += own if number == 0 else 0
                self._keep(_gradient(layers.count, number, j), back)
            if number == 0:
                probes = probes_for(rows, self.given.most_probes)
            number += 1
        return _Probes(rows * probes, probes, samples, masked, loss.note)

    # -------------------------------------------------------------------------------- the layers

    def _block(self, k: int, todo: Sequence[Site], probes: _Probes) -> None:
        gathering = Gathering(self.found, {site.name for site in todo})
        with self.layers.block(k) as block:
            wanted = self._wanted(k, gathering)
            for j in probes.masked:
                probe = self._towards(_counting(k + 1, j))
                self._count(block, k, j, self.layers.inputs(k, j), wanted, probe)
            self._gather(block, k, gathering, wanted, probes, partial(self.layers.inputs, k))
        self._learn(k, gathering, todo, probes)

    def _front(self, front: nn.Module, back: Part, gathering: Gathering, probes: _Probes) -> None:
        layers, inputs = self.layers, self.layers.arguments
        wanted = _used(front, inputs(0), self._wanted(None, gathering))
        for j in probes.masked if wanted else ():
            after = self._of_back.get(j, {})
            self._count(front, None, j, inputs(j), wanted, self._towards(_counting(0, j)))
            before = self._masks[j]
            both = {*before, *after}
            self._masks[j] = {n: {**after.get(n, {}), **before.get(n, {})} for n in both}
        if self.found.metric != "loss":  # a run of the back goes through the front as well
            wanted = self._wanted(None, gathering)
            self._gather(back, None, gathering, wanted, probes, layers.outputs_from)
        elif wanted:
            self._gather(front, None, gathering, wanted, probes, inputs)

    def _gather(
        self,
        part: nn.Module,
        k: int | None,
        gathering: Gathering,
        wanted: Wanted,
        probes: _Probes,
        inputs: Callable[[int], Batch],
    ) -> None:
        """Add all runs of a part to the moments of its weights; gradients go on."""
        learnt, loss = self.given.learnt, self.found.metric == "loss"
        if loss and wanted:
            gathering.look(part, inputs(learnt[0]), wanted)
        total = (self.layers.count + 1) * probes.count * len(learnt)
        for number in range(probes.count):
            for j in learnt:
                self.found.progress("statistics", self._done, total)
                self._done += 1
                given = part, inputs(j), wanted, self._rows_of(j)
                if loss:
                    after = 0 if k is None else k + 1
                    towards = self._towards(_gradient(after, number, j))
                    probe = partial(_probed, towards, probes.samples[j])
                    gathering.add_gradients(*given, probe)
                    if isinstance(part, Part) and k is not None:
                        self._keep(_gradient(k, number, j), part)
                elif wanted:
                    gathering.add_inputs(*given)
                give_back()

    def _learn(
        self, part: int | None, gathering: Gathering, todo: Sequence[Site], probes: _Probes
    ) -> None:
        """Turn moments into curves, each kept as soon as it is made."""
        found, work = self.found, self.layers.work
        observed = gathering.observed(probes.rows, probes.count, len(self.given.learnt))
        told = work.noted(_told(part)) or {"notes": [], "few": {}}
        notes = {*told["notes"], *observed.notes[len(found.notes) :]}
        work.note(_told(part), {"notes": sorted(notes), "few": {**told["few"], **observed.few}})
        moved = found.to(Observed, statistics=observed.statistics)
        self.spectra = self.given.spectra.curves(moved, todo, self.spectra)

    # ----------------------------------------------------------------- what goes to the part before

    def _count(
        self,
        part: nn.Module,
        k: int | None,
        j: int,
        batch: Batch,
        wanted: Wanted,
        probe: Callable[[Any], Tensor],
    ) -> None:
        """Learn which rows of a part's weights count, and keep what tells the part before."""
        sites = {site.name: site for site in self.found.free}
        self._masks[j] = reached_rows(part, batch, wanted, sites, probe)
        if isinstance(part, Part):
            self._keep(_counting(self.layers.count if k is None else k, j), part)

    def _rows_of(self, j: int) -> Masks:
        masks = self._masks.get(j, {})
        return lambda name, number: masks.get(name, {}).get(number)

    def _towards(self, name: str) -> Callable[[Any], Tensor]:
        """A scalar of what a part gives whose gradient there is the one that was kept."""

        def probe(result: Tensor) -> Tensor:
            arrived = self.layers.work.get(name)["gradient"].to(result.device)
            return (result * arrived).sum()

        return probe

    def _keep(self, name: str, part: Part) -> None:
        arrived, part.entry.gradient = part.entry.gradient, None
        assert arrived is not None
        self.layers.work.put(name, gradient=arrived)

    def _has_gradients(self, k: int, probes: _Probes) -> bool:
        return all(self.layers.work.has(name) for name in self._names(k, probes))

    def _drop_gradients(self, k: int, probes: _Probes) -> None:
        for name in self._names(k, probes):
            self.layers.work.drop(name)

    def _names(self, k: int, probes: _Probes) -> list[str]:
        """Of what goes from the k-th block to the one before."""
        names = [_counting(k, j) for j in probes.masked]
        if self.found.metric == "loss":
            learnt = self.given.learnt
            names += [_gradient(k, p, j) for p in range(probes.count) for j in learnt]
        return names


def _probed(towards: Callable[[Any], Tensor], samples: int | None, result: Any) -> Probed:
    return Probed(towards(result), 0, samples)


def _used(front: nn.Module, batch: Batch, wanted: Wanted) -> Wanted:
    """Those that a part uses."""
    used: set[str] = set()

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        used.add(name)
        return output

    def on_other(name: str, function: str) -> None:
        used.add(name)

    with untouched(front), Observer(wanted, on_matmul, on_other):
        call(front, batch)
    return [(name, parameter) for name, parameter in wanted if name in used]


def _gradient(k: int, number: int, j: int) -> str:
    return f"gradient-{k:04}-{number}-{j:05}"


def _counting(k: int, j: int) -> str:
    return f"counting-{k:04}-{j:05}"


def _told(part: int | None) -> str:
    return "told-outer" if part is None else f"told-{part:04}"
