"""Trial plans measured layer by layer, on batches whose way through the dense model is known.

Every block runs once for each plan, with what stands for its weights there, on what the blocks
before gave with theirs. So there are one block's weights and factors at a time, whatever the number
of plans, and the numbers are those of runs of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.records import plain
from tensorize.base.tensors import give_back
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.capture.observer import StandIns
from tensorize.capture.synthetic import only_ids, same_before_last
from tensorize.ir.plan import NATS
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import Store
from tensorize.passes.layers.layers import Layers, fitted_loss
from tensorize.passes.layers.refit import Refitting
from tensorize.passes.layers.work import Work, named_by
from tensorize.passes.observe.loss import LossOption
from tensorize.passes.observe.outputs import call, essential, row_name, row_total, samples_of
from tensorize.passes.observe.text import TextLoss
from tensorize.passes.predict.trials import Measurement, Sites, Tally, stand_ins
from tensorize.passes.rewrite.factorize import Cores, best_components, planned_cores
from tensorize.passes.stages import Learned

OfPart = Mapping[str, Cores]
Make = Callable[[Learned, int | None, Sequence[Sites]], Iterator[OfPart]]
"""Makes the factors of a part (None: of what is outside of the blocks) for every plan."""


class LayeredReference:
    """The dense model on those of the layers' batches whose places are ``held_out``.

    Refits are on those ``learnt`` from. The ``store`` has the curves whole.
    """

    def __init__(
        self,
        layers: Layers,
        learnt: Sequence[int],
        held_out: Sequence[int],
        store: Store,
        loss_fn: LossOption,
    ) -> None:
        self._layers, self._learnt, self._places, self._store = layers, learnt, held_out, store
        self._model, self._batches = layers.chain.model, [layers.batches[j] for j in held_out]
        self.metrics: tuple[Any, ...] = ()
        self.rows, self.one_row_a_sample = 0, False
        with layers.outer() as (_, back):
            self.loss = fitted_loss(layers, back, loss_fn)
            text = TextLoss(self._model, partial(self._is_causal, back))
            with untouched(back):
                for j, batch in zip(held_out, self._batches, strict=True):
                    result = call(back, layers.outputs_from(j))
                    self.loss.require_finite(result, batch, self._model)
                    if self.loss.unit == NATS:
                        text.add(batch, result)
                    if j == held_out[0]:
                        self.one_row_a_sample = samples_of(result, self._model) is not None
                        self.row = row_name(result, batch, self._model)
                    self.rows += row_total(result, batch, self._model)
        self.text_loss = text.value if self.loss.unit == NATS else None

    def _is_causal(self, back: nn.Module) -> bool:
        """Whether the model is a decoder, by what it gives for two texts."""
        layers = self._layers
        ids = None if layers.texts is None else only_ids(layers.texts)
        if ids is None:
            return False
        logits = getattr(call(back, layers.outputs_from(layers.of_texts)), "logits", None)
        both = isinstance(logits, Tensor)
        return both and same_before_last(logits[:1], logits[1:], ids[:1])

    def try_nothing(self, learned: Learned) -> Measurement:
        raise AssertionError("some batches are always held out")

    def try_refined(
        self, learned: Learned, sites: Sites, cores: Callable[[], Mapping[str, Cores]]
    ) -> Measurement:
        """What a plan loses with its factors refit, layer by layer."""
        refit = Refitting(self._layers, learned, sites, self._learnt, self._store)
        refit.run()
        (found,) = self._tried(learned, [sites], "refit", lambda _, k, __: iter([refit.cores(k)]))
        return found

    def try_plans(
        self, learned: Learned, plans: Sequence[Sites], *, cut: bool
    ) -> list[Measurement]:
        """What plans lose, all tried in one way through the layers."""

        def make(part: Learned, _: int | None, plans: Sequence[Sites]) -> Iterator[OfPart]:
            known = best_components(part, plans) if cut else None
            return (planned_cores(part, sites, known) for sites in plans)

        return self._tried(learned, plans, "cut" if cut else "alone", make)

    def _tried(
        self, learned: Learned, plans: Sequence[Sites], how: str, make: Make
    ) -> list[Measurement]:
        """What plans lose with the factors that are made; kept once it is known."""
        work = self._layers.work
        name = named_by(plain([list(sites) for sites in plans]), list(self._places), how)
        if (known := work.noted(f"trials-{name}")) is None:
            found = _Trials(self, learned, plans, make, name).run()
            known = {"found": [asdict(each) for each in found]}
            work.note(f"trials-{name}", known)
        return [Measurement(**{**each, "metrics": ()}) for each in known["found"]]


class _Trials:
    """One way of several plans through the layers."""

    def __init__(
        self,
        reference: LayeredReference,
        learned: Learned,
        plans: Sequence[Sites],
        make: Make,
        name: str,
    ) -> None:
        self._reference, self._learned, self._make, self._name = reference, learned, make, name
        self._plans = plans
        self._done = 0

    @property
    def _layers(self) -> Layers:
        return self._reference._layers

    @property
    def _work(self) -> Work:
        return self._layers.work

    def run(self) -> list[Measurement]:
        layers = self._layers
        there = [k for k in range(layers.count + 1) if self._has(k)]
        if not there:
            with layers.outer() as (front, _):
                self._pass(front, None, lambda j, _: layers.arguments(j))
        for k in range(max(there, default=0), layers.count):
            with layers.block(k) as block:
                self._pass(block, k, lambda j, hidden, k=k: layers.inputs(k, j, hidden))
            self._drop(k)
        found = self._compared()
        self._drop(layers.count)
        return found

    def _pass(
        self,
        part: nn.Module,
        k: int | None,
        inputs: Callable[[int, Tensor], Batch],
    ) -> None:
        """Run a part with what stands for its weights in every plan."""
        after = 0 if k is None else k + 1
        for p, tensors in enumerate(self._stand_ins(k)):
            for j in self._reference._places:
                self._tell()
                before = torch.empty(0) if k is None else self._hidden(k, p, j)
                given = inputs(j, before)
                with untouched(part), fitting(part, given), StandIns(tensors):
                    self._work.put(self._file(after, p, j), hidden=once(part, given))
                give_back()

    def _compared(self) -> list[Measurement]:
        """What the back gives for every plan, beside what it gives in the dense model.

        The dense model's outputs are made again for each: one plan's factors are there at a time.
        """
        reference, layers = self._reference, self._layers
        found: list[Measurement] = []
        with layers.outer() as (_, back), untouched(back):
            for p, tensors in enumerate(self._stand_ins(None)):
                tally = Tally()
                for j, batch in zip(reference._places, reference._batches, strict=True):
                    self._tell()
                    before = call(back, layers.outputs_from(j))
                    before = before if reference.loss.loss_fn else essential(before)
                    given = layers.outputs_from(j, self._hidden(layers.count, p, j))
                    with fitting(back, given), StandIns(tensors):
                        after = once(back, given)
                    tally.compare(reference.loss, before, after, batch, layers.chain.model)
                    del before, after
                    give_back()
                found.append(tally.measurement())
        return found

    def _stand_ins(self, k: int | None) -> Iterator[dict[int, Any]]:
        """What stands for the weights of a part that is there, for every plan."""
        chain, learned = self._layers.chain, self._learned
        own = {n: c for n, c in learned.spectra.items() if chain.part_of(n) == k}
        whole = {n: self._reference._store.complete(curve) for n, curve in own.items()}
        part = replace(learned, model=chain.model, spectra=whole)
        plans = [[choice for choice in sites if choice.name in own] for sites in self._plans]
        parameters = dict(chain.model.named_parameters())
        for sites, cores in zip(plans, self._make(part, k, plans), strict=True):
            stands = stand_ins(part, sites, cores)
            yield {id(parameters[name]): stand for name, stand in stands.items()}

    # -------------------------------------------------------------------------------------- files

    def _file(self, k: int, p: int, j: int) -> str:
        return f"trial-{self._name}-{k:04}-{p}-{j:05}"

    def _files(self, k: int) -> list[str]:
        return [
            self._file(k, p, j) for p in range(len(self._plans)) for j in self._reference._places
        ]

    def _has(self, k: int) -> bool:
        return all(self._work.has(name) for name in self._files(k))

    def _drop(self, k: int) -> None:
        for name in self._files(k):
            self._work.drop(name)

    def _hidden(self, k: int, p: int, j: int) -> Tensor:
        return self._work.get(self._file(k, p, j))["hidden"].to(self._layers.device)

    def _tell(self) -> None:
        batches = len(self._reference._places)
        total = batches * len(self._plans) * (self._layers.count + 2)
        self._learned.progress("prediction", self._done, total)
        self._done += 1
