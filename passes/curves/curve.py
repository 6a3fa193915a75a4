"""The rate-distortion curve of one weight: what it loses at each rank of each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from tensorize.algebra.metric import Metric, average
from tensorize.algebra.rates import Side, sides_of
from tensorize.base.errors import AnalysisError
from tensorize.formats.dense import is_dense
from tensorize.formats.format import TensorTrain
from tensorize.formats.registry import format_of
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec
from tensorize.passes.curves.rounding import Rounding

Weights = Callable[[str], Tensor]
"""The dense weights, by name."""


@dataclass(frozen=True)
class SharedFactor:
    """A first factor V (K, N) that weights W_k of one input have in common: W_k ≈ (W_k P) V.

    ``reader`` is P (N, K). At rank r the first r components count; ``distortion[r]`` is what the
    weight that holds this then loses. The members of a group hold the same tensors.
    """

    factor: Tensor
    reader: Tensor
    distortion: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The curve of one weight.

    ``distortion[r]`` is what the best factors of rank r (r = 0 … min(M, N)) lose in the units of
    the metric; ``distortion[0]`` is the whole weight. The factors themselves are made for the one
    rank that is wanted: all of them would take as much memory as the weight. ``trains`` are the
    structures tried of other formats, ``train_points`` what their roundings lose. ``in_nats`` is
    False for a weight that the calibration data say nothing about. ``shared`` is the curve with a
    first factor in common with other weights. ``measured`` are pairs of a distortion and the rise
    of the loss that it was found to cost, of a weight measured by itself. ``roundings`` say what
    fewer bits add, for every precision that was asked for. ``squares`` are the means of the squares
    of its rows and of its columns, where its entries are real. ``few``: the rows that it met in the
    data and its columns, where they were fewer; ``unforeseen``: of lookups to come the share that
    will be of rows not met, of a table.
    """

    site: Site
    formats: tuple[str, ...]
    metrics: tuple[Metric, ...]
    distortion: Tensor
    trains: tuple[TensorTrain[Spec], ...] = ()
    train_points: tuple[tuple[Spec, float], ...] = ()
    in_nats: bool = True
    shared: SharedFactor | None = None
    measured: tuple[tuple[float, float], ...] = ()
    roundings: tuple[Rounding, ...] = ()
    squares: tuple[Tensor, Tensor] | None = None
    few: tuple[int, int] | None = None
    unforeseen: float | None = None

    @property
    def codes(self) -> bool:
        """Whether files may hold the weight in codes that are chosen in its metric."""
        return self.squares is not None and not self.apart and not self.site.modes

    @property
    def apart(self) -> bool:
        """Whether every matrix of a stack has a metric of its own."""
        return any(metric.apart for metric in self.metrics)

    @property
    def scale(self) -> float:
        """That of its metric."""
        return self._metric.scale

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """What is to be known of its rows and columns to say what codes take."""
        assert self.squares is not None
        rows, columns = self.squares
        mean = columns.double().mean().clamp_min(1e-300)
        return sides_of(self._metric, (rows, columns.double() / mean))

    @cached_property
    def _metric(self) -> Metric:
        return average(self.metrics)

    def rise(self, distortion: np.ndarray) -> np.ndarray:
        """What distortions add to the loss: as much, or as was measured for this weight.

        Between two measured ones on logarithmic scales, beyond them in proportion.
        """
        known = [(lost, found) for lost, found in self.measured if lost > 0 and found > 0]
        if not known:
            return distortion
        losses, found = np.log(np.array(known).T)
        found = np.maximum.accumulate(found)
        logs = np.log(np.maximum(distortion, 1e-300))
        nearest = np.clip(logs, losses[0], losses[-1])
        rises = np.exp(np.interp(nearest, losses, found) + logs - nearest)
        return np.where(distortion > 0, rises, 0.0)

    def error(self, distortion: float) -> float:
        """The relative error of the weight in its metric: sqrt(distortion / whole)."""
        return float(self.errors(np.array(distortion)))

    def errors(self, distortions: np.ndarray) -> np.ndarray:
        """The relative errors that go with distortions."""
        whole = float(self.distortion[0])
        if whole <= 0:
            return np.zeros_like(distortions)
        return np.sqrt(np.maximum(distortions, 0.0) / whole)

    def distortion_of(self, spec: Spec) -> float:
        """What a spec of this weight loses; exact ranks lose nothing."""
        if spec.precision is not None:
            return self._rounded(spec)
        spec, form = spec.plain, format_of(spec)
        if form.spectral:
            return float(self.distortion[min(spec.ranks[0], len(self.distortion) - 1)])
        for known, lost in self.train_points:
            if known == spec:
                return lost
        exact = self._exact(spec)
        weight = form.reconstruct(exact.spec, exact.cores)
        cores = form.factors(spec, weight, self.metrics, exact)
        return form.error(spec, cores, weight, self.metrics)

    def _rounded(self, spec: Any) -> float:
        found = next(r for r in self.roundings if r.precision == spec.precision)
        if is_dense(spec.format):
            return found.dense
        return self.distortion_of(spec.inner) + float(found.low_rank[spec.ranks[0]])

    def _exact(self, spec: Spec) -> TensorTrain[Spec]:
        """The structure that a spec is a rounding of."""
        form = format_of(spec)
        for exact in self.trains:
            if form.is_cut(spec, exact.spec):
                return exact
        raise AnalysisError(
            f"the analysis holds no {form.title} with the modes of {spec}",
            site=self.site.name,
            way_out=f"analyse with formats={spec.format!r}",
        )

    def factors(self, spec: Spec, weight: Tensor, *, shared: bool = False) -> tuple[Tensor, ...]:
        """The cores of ``spec.plain`` for the dense weight, as they are computed.

        ``shared``: with the first factor that it has in common with others.
        """
        if shared:
            assert self.shared is not None
            (rank,) = spec.ranks
            reader = self.shared.reader[:, :rank]
            return weight.to(reader.dtype) @ reader, self.shared.factor[:rank]
        spec = spec.plain
        if is_dense(spec.format):
            return (weight,)
        form = format_of(spec)
        exact = None if form.spectral else self._exact(spec)
        return form.factors(spec, weight, self.metrics, exact)

    def require(self, formats: Sequence[str]) -> None:
        """Raises AnalysisError for a format that was not analysed."""
        for name in formats:
            if not is_dense(name) and name not in self.formats:
                raise AnalysisError(
                    f"the format {name!r} was not analysed (only {', '.join(self.formats)})",
                    site=self.site.name,
                    way_out=f"analyse with formats={(*self.formats, name)!r}",
                )

    def measured_error(self, weight: Tensor, approximation: Tensor) -> float:
        """The relative error in the metric of an approximation (M, N), which is overwritten."""
        delta = approximation.sub_(weight)
        return self.error(sum(metric.norm(delta) for metric in self.metrics))


class Store(Protocol):
    """Keeps what is finished, so that a run that was killed goes on after it.

    What it gives back takes the place of what it was given: it may lie on disk.
    """

    def find(self, site: Site) -> Spectrum | None: ...

    def keep(self, curve: Spectrum) -> Spectrum: ...

    def complete(self, curve: Spectrum) -> Spectrum:
        """One that it gave back, with all of its tensors."""
        ...

    def find_shared(self, group: str) -> Mapping[str, SharedFactor] | None: ...

    def keep_shared(
        self, group: str, members: Mapping[str, SharedFactor]
    ) -> Mapping[str, SharedFactor]: ...


def weights_of(model: nn.Module) -> Weights:
    """The dense weights of a model, by name."""
    parameters = dict(model.named_parameters())
    return lambda name: parameters[name].detach()


def as_matrix(site: Site, weight: Tensor) -> Tensor:
    """The weight as (M, N), or (experts, M, N): a convolution's kernel is part of its columns."""
    if site.modes:
        return weight.flatten(-site.modes).movedim(-1, 0)
    lead = (site.experts,) if site.experts else ()
    return weight.reshape(*lead, *site.matrix)
