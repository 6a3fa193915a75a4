"""Sums over the layers of each stage of a pipeline, each figure of a layer computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tensorize.distributed.strategy.workload import Layer, Workload

Figure = Callable[[Layer], float]


class OverLayers:
    """Figures of a model's layers by their names; layers that are alike are looked at once."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        unlike = {layer: k for k, layer in enumerate(dict.fromkeys(workload.layers))}
        self._unlike = tuple(unlike)
        self._which = np.array([unlike[layer] for layer in workload.layers])
        self._sums: dict[tuple[object, int], np.ndarray] = {}
        self._each: dict[object, np.ndarray] = {}

    @property
    def unlike(self) -> tuple[Layer, ...]:
        """One of each kind of layers."""
        return self._unlike

    def stages(self, pp: int, name: object, figure: Figure) -> np.ndarray:
        """A figure's sum over the layers of every stage."""
        if (name, pp) not in self._sums:
            along = np.append(0.0, np.cumsum(self._figures(name, figure)[self._which]))
            self._sums[name, pp] = np.diff(along[stage_ends(len(self._which), pp)])
        return self._sums[name, pp].copy()

    def largest(self, name: object, figure: Figure) -> float:
        """A figure of the layer of which it is largest."""
        return float(self._figures(name, figure).max())

    def _figures(self, name: object, figure: Figure) -> np.ndarray:
        if name not in self._each:
            self._each[name] = np.array([figure(layer) for layer in self._unlike], dtype=float)
        return self._each[name]


@cache
def stage_ends(layers: int, pp: int) -> np.ndarray:
    """Where stages begin and end: as even as they go, the last of them not larger than others."""
    sizes = np.full(pp, layers // pp) + (np.arange(pp) < layers % pp)
    return np.append(0, np.cumsum(sizes))
