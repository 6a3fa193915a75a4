"""Factors solved again on the inputs that weights will really see, layer by layer.

As in ``passes/rewrite/refit.py`` every batch goes through the dense and through the small model,
and waits at each weight until that is solved. Of one block at a time: what arrives there in the
dense model lies on disk, and what arrives in the small one, and the factors, once they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tensorize.base.progress import no_progress
from tensorize.base.records import plain
from tensorize.base.tensors import give_back
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.capture.observer import StandIns
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import Store
from tensorize.passes.layers.count import masks_of
from tensorize.passes.layers.gradients import drop_all, has_all
from tensorize.passes.layers.layers import Layers, Place, used_in, wanted_in
from tensorize.passes.layers.work import named_by
from tensorize.passes.predict.trials import stand_ins
from tensorize.passes.rewrite.factorize import Cores
from tensorize.passes.rewrite.refit import refit_part
from tensorize.passes.stages import Dense, Opened


@dataclass(frozen=True)
class RefitInLayers:
    """Makes the planned factors, solved again on the rows of the layers' batches that count.

    They stay on disk, where ``found`` reads them.
    """

    layers: Layers
    store: Store
    name: str = "refit"

    def run(self, opened: Opened) -> Opened:
        count = self._of(opened).run()
        summary = f"{count} weights in sequence, on {len(self.layers.batches)} batches"
        return replace(opened, summary=summary)

    def found(self, opened: Opened) -> Callable[[str], Cores | None]:
        """The factors by the name of their weight."""
        refit = self._of(opened)
        return lambda name: refit.cores(self.layers.chain.part_of(name)).get(name)

    def _of(self, opened: Opened) -> Refitting:
        places = tuple(range(len(self.layers.batches)))
        return Refitting(self.layers, opened, opened.plan.sites, places, self.store)


class Refitting:
    """A refit of a plan on those of the layers' batches whose places are given."""

    def __init__(
        self,
        layers: Layers,
        dense: Dense,
        sites: Sequence[RankPlan],
        places: Sequence[int],
        store: Store,
    ) -> None:
        self._layers, self._dense, self._places, self._store = layers, dense, places, store
        self._sites = [choice for choice in sites if choice.spec is not None]
        self._name = named_by(plain(list(sites)), list(places))

    def run(self) -> int:
        """Find the factors of all weights, and keep them; how many they are."""
        layers, work = self._layers, self._layers.work
        if has_all(work, [self._file("back")]):
            return len(self._sites)
        there = [k for k in range(layers.count + 1) if has_all(work, self._files(k))]
        total = layers.count + 2
        self._dense.progress("refit", max(there, default=0), total)
        if not there:
            with layers.outer() as (front, _):
                self._part(front, "front", lambda j, _: layers.arguments(j))
        for k in range(max(there, default=0), layers.count):
            self._dense.progress("refit", k + 1, total)
            with layers.block(k) as block:
                self._part(block, k, lambda j, hidden, k=k: layers.inputs(k, j, hidden))
            drop_all(work, self._files(k))
        self._dense.progress("refit", layers.count + 1, total)
        with layers.outer() as (_, back):
            self._part(back, "back", layers.outputs_from)
        drop_all(work, self._files(layers.count))
        self._dense.progress("refit", total, total)
        return len(self._sites)

    def cores(self, part: int | None) -> dict[str, Cores]:
        """The factors of the weights of a block (None: of what is outside of all)."""
        found: dict[str, Cores] = {}
        for place in ("front", "back") if part is None else (part,):
            found |= self._kept(place)
        return found

    def _part(
        self, part: nn.Module, place: Place, inputs: Callable[[int, Tensor | None], Batch]
    ) -> None:
        layers, work = self._layers, self._layers.work
        chosen = self._of(part, place, inputs)
        pairs = [(inputs(j, None), inputs(j, self._hidden(place, j))) for j in self._places]
        own = {choice.name for choice in chosen}
        curves = {n: self._store.complete(self._dense.spectra[n]) for n in own}
        counted = {
            pair[0]: masks_of(layers, place, j) for j, pair in zip(self._places, pairs, strict=True)
        }
        dense = replace(
            self._dense,
            model=layers.chain.model,
            spectra=curves,
            counted=counted,
            progress=no_progress,
        )
        cores = refit_part(dense, chosen, part, pairs) if chosen else {}
        work.put(
            self._file(place),
            **{f"{k}.{name}": core for name, held in cores.items() for k, core in enumerate(held)},
        )
        if place == "back":
            return
        parameters = dict(layers.chain.model.named_parameters())
        stands = stand_ins(dense, chosen, cores)
        tensors = {id(parameters[name]): stand for name, stand in stands.items()}
        after = place + 1 if isinstance(place, int) else 0
        for j, (_, small) in zip(self._places, pairs, strict=True):
            with untouched(part), fitting(part, small), StandIns(tensors):
                work.put(self._small(after, j), hidden=once(part, small))
            give_back()

    def _of(
        self, part: nn.Module, place: Place, inputs: Callable[[int, Tensor | None], Batch]
    ) -> list[RankPlan]:
        """What is planned of a part; what is outside of the blocks is the front's if it uses it."""
        chain = self._layers.chain
        if isinstance(place, int):
            return [choice for choice in self._sites if chain.part_of(choice.name) == place]
        outer = [choice for choice in self._sites if chain.part_of(choice.name) is None]
        if place == "back":
            front = self._kept("front")
            return [choice for choice in outer if choice.name not in front]
        wanted = wanted_in(chain, None, {choice.name for choice in outer})
        used = {name for name, _ in used_in(part, inputs(self._places[0], None), wanted)}
        return [choice for choice in outer if choice.name in used]

    def _hidden(self, place: Place, j: int) -> Tensor | None:
        """What arrives at a part in the small model."""
        if place == "front":
            return None
        k = self._layers.count if place == "back" else place
        return self._layers.work.get(self._small(k, j))["hidden"].to(self._layers.device)

    def _kept(self, place: Place) -> dict[str, Cores]:
        found: dict[str, dict[int, Tensor]] = {}
        for key, core in self._layers.work.get(self._file(place)).items():
            number, _, name = key.partition(".")
            found.setdefault(name, {})[int(number)] = core
        return {name: tuple(own[k] for k in sorted(own)) for name, own in found.items()}

    def _file(self, place: Place) -> str:
        return f"refit-{self._name}-{place}"

    def _small(self, k: int, j: int) -> str:
        return f"small-{self._name}-{k:04}-{j:05}"

    def _files(self, k: int) -> list[str]:
        return [self._small(k, j) for j in self._places]
