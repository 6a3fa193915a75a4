"""Codes chosen for the inputs that weights really meet: those that the coded weights before leave.

Weights are taken in the order of their use, as factors are in a refit. What is coded is the map
that brings a weight's outputs back to those of the model as it was (as in a refit), in the metric
of the inputs that there are now. Steps stay those of one θ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensorize.algebra.metric import Metric
from tensorize.algebra.water import Filled
from tensorize.base.progress import Progress, no_progress
from tensorize.capture.forward import untouched
from tensorize.capture.matmul import Frame, Matmul
from tensorize.coding.groups import Coded
from tensorize.ir.sites import Batch
from tensorize.passes.filling.weights import Weight
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.rewrite.drift import Drift, Pair, Rows
from tensorize.passes.rewrite.runs import WeightRun, run_order
from tensorize.passes.rewrite.sequence import Masks, in_order


@dataclass(frozen=True, eq=False)
class Refit:
    """A model whose weights are coded, and data; ``masks`` say which rows of it count."""

    model: nn.Module
    batches: Sequence[Batch]
    masks: Masks
    progress: Progress = no_progress

    def on(self, batches: Sequence[Batch]) -> Refit:
        """The same on other data."""
        return replace(self, batches=batches)

    @torch.no_grad()
    def codes(self, weights: Sequence[Weight], theta: float) -> dict[int, Coded]:
        """The codes of every tensor, by its id."""
        parameters = dict(self.model.named_parameters())
        parts = self._parts(weights, parameters)
        found: dict[int, Coded] = {}
        for weight in weights:
            if id(weight.tensors[0]) not in {id(parameters[name]) for name in parts}:
                found |= zip(map(id, weight.tensors), weight.coded(theta), strict=True)
        small = copy_sharing(self.model, parts, to_run=True)
        for name, parameter in small.named_parameters():
            if coded := found.get(id(parameters[name])):
                parameter.copy_(coded.numbers.reshape(parameter.shape))
        waiting = {name: parameters[name] for name in parts}
        numbers: dict[str, Tensor] = {}

        def multiplied(name: str, frame: Frame, matmul: Matmul) -> Tensor:
            return _product(matmul, numbers[name])

        def pair(batch: Batch) -> Pair:
            dense = WeightRun(self.model, batch, waiting, list(parts), None)
            return dense, WeightRun(small, batch, waiting, list(parts), multiplied)

        rows = {name: rows for name, (_, rows) in parts.items()}
        turns = in_order(list(parts), self.batches, pair, rows, self.masks)
        with untouched(self.model), untouched(small), contextlib.closing(turns):
            for done, (name, drift) in enumerate(turns):
                self.progress("coding", done, len(parts))
                filled, _ = parts[name]
                filled = _met(filled, drift) if drift.seen else filled
                coded = found[id(parameters[name])] = Coded.of(*filled.codes(theta))
                numbers[name] = coded.numbers.to(parameters[name])
        return found

    def _parts(
        self, weights: Sequence[Weight], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, tuple[Filled, Rows]]:
        """What is coded in its turn, in the order of use: all tensors of a weight, or none."""
        wanted = {id(tensor) for weight in weights for tensor in weight.tensors if weight.rows}
        watched = {name: p for name, p in parameters.items() if id(p) in wanted}
        with untouched(self.model):
            used = {id(watched[n]): n for n in run_order(self.model, self.batches[0], watched)}
        parts: dict[str, tuple[Filled, Rows]] = {}
        for weight in weights:
            if weight.rows and all(id(tensor) in used for tensor in weight.tensors):
                names = [used[id(tensor)] for tensor in weight.tensors]
                parts |= zip(names, zip(weight.filled, weight.rows, strict=True), strict=True)
        return {name: parts[name] for name in used.values() if name in parts}


def _met(filled: Filled, drift: Drift) -> Filled:
    """What is to be coded for the inputs that a weight meets, in their metric."""
    rows = drift.contract == "rows"
    matrix, metric = filled.matrix, filled.metric
    if rows:
        matrix, metric = matrix.t(), metric.transposed()
    (target,), factor = drift.towards([matrix], [metric.left])
    # As the analysis counts a weight's inputs, whatever the data here are.
    unit = math.sqrt(_size(metric.right, matrix.shape[1]) / max(drift.size, 1e-30))
    metric = Metric(metric.scale, metric.left, (factor * unit).float())
    return Filled(target.t(), metric.transposed()) if rows else Filled(target, metric)


def _size(root: Tensor | None, count: int) -> float:
    """The trace of the moment of some inputs."""
    return float(count) if root is None else float(root.double().square().sum())


def _product(matmul: Matmul, matrix: Tensor) -> Tensor:
    y = matmul.x @ (matrix if matmul.contract == "rows" else matrix.mT)
    return matmul.from_rows(y if matmul.bias is None else y + matmul.bias)
