"""The prediction of the loss, calibrated by trials that go through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tensorize.passes.curves.curve import Store
from tensorize.passes.layers.layers import Layers
from tensorize.passes.layers.trials import LayeredReference
from tensorize.passes.observe.loss import LossOption
from tensorize.passes.predict.calibrate import CalibratePrediction
from tensorize.passes.predict.largest import MeasureLargest
from tensorize.passes.stages import Analysed, Learned


@dataclass(frozen=True)
class PredictInLayers:
    """Makes the predictor, from trials on those of the layers' batches that are ``held_out``.

    ``refinements`` are measured as well: a refit, on those ``learnt`` from.
    """

    layers: Layers
    learnt: tuple[int, ...]
    held_out: tuple[int, ...]
    store: Store
    refinements: tuple[str, ...] = ()
    loss_fn: LossOption = None
    name: str = "predict"

    def run(self, learned: Learned) -> Analysed:
        if learned.metric != "loss":
            return CalibratePrediction((), (), None).run(learned)
        self.layers.run(learned.progress)  # where curves were all kept, nothing ran yet
        reference = self._reference(self.held_out)
        if reference.one_row_a_sample:
            everything = tuple(range(len(self.layers.batches)))
            learned = MeasureLargest((), None, partial(self._reference, everything)).run(learned)
        batches = tuple(self.layers.batches[j] for j in self.held_out)
        predict = CalibratePrediction(
            (), batches, reference.loss, self.refinements, measuring=lambda: reference
        )
        return predict.run(learned)

    def _reference(self, places: tuple[int, ...]) -> LayeredReference:
        return LayeredReference(self.layers, self.learnt, places, self.store, self.loss_fn)
