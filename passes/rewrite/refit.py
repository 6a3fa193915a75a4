"""Sequential refit: every weight's factors solved again on the inputs that it will really see.

The one-shot factors are best for the dense model's inputs. In the compressed model a weight sees
inputs x̃ that the weights before it have changed, while its outputs should still be those of the
dense model, W x. So weights are taken in the order of their use: with C̃ = E[x̃ x̃ᵀ] and
K = E[x x̃ᵀ], both from calibration data, the map that is best on x̃ is T = W K C̃⁻¹, and its best
rank-r factors in the metric (G of the gradients, C̃ of the inputs) follow from one whitened SVD, as
for the dense weight. No gradients are needed.

All of it is one pass: every calibration batch runs through the dense and through the compressed
model at once, and waits at each weight until that weight is solved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric
from tensorize.base.tensors import give_back
from tensorize.capture.forward import untouched
from tensorize.capture.matmul import Frame, Matmul
from tensorize.formats.dense import is_dense
from tensorize.formats.registry import format_of
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Batch, Site
from tensorize.passes.curves.curve import Spectrum, as_matrix
from tensorize.passes.curves.joint import joint_factors
from tensorize.passes.curves.metric import shrink, shrinkage
from tensorize.passes.observe.counted import Counted, rows_of
from tensorize.passes.observe.moments import plus, products
from tensorize.passes.observe.rows import input_rows
from tensorize.passes.rewrite.factorize import Cores, planned_cores, quantized, stand_in
from tensorize.passes.rewrite.runs import WeightRun, run_order
from tensorize.passes.stages import Dense, Opened


@dataclass(frozen=True)
class Refit:
    """Makes the planned factors, solved again on the rows of ``batches`` that count."""

    batches: tuple[Batch, ...]
    name: str = "refit"

    def run(self, opened: Opened) -> Opened:
        cores = refit(opened, opened.plan.sites, self.batches)
        summary = f"{len(cores)} weights in sequence, on {len(self.batches)} batches"
        return replace(opened, cores=cores, summary=summary)


@torch.no_grad()
def refit(
    dense: Dense,
    sites: Sequence[RankPlan],
    batches: Sequence[Batch],
    solved_by: type[Moments] | None = None,
) -> dict[str, Cores]:
    """The cores of a plan, those of plain low-rank weights solved again, by ``Moments``."""
    moments_of = solved_by or Moments
    chosen = {choice.name: choice for choice in sites if choice.spec is not None}
    specs: dict[str, Any] = {name: choice.made_as for name, choice in chosen.items()}
    parameters = {n: p for n, p in dense.model.named_parameters() if n in specs}
    by_name = {site.name: site for site in dense.sites}
    cores: dict[str, Cores] = {}

    def use_planned(*names: str) -> None:
        if wanted := [c for c in sites if c.name in names and c.name not in cores]:
            cores.update(planned_cores(dense, wanted))

    def compressed(name: str, frame: Frame, matmul: Matmul) -> Tensor:
        if name not in cores:  # it is solved after this batch came by it, or never
            use_planned(name)
        weight = stand_in(specs[name], cores[name], parameters[name], frame)
        if specs[name].precision is not None and not weight.can_run(matmul):
            weight = weight.as_pair()
        return weight.run(matmul)

    runs: list[tuple[WeightRun, WeightRun]] = []
    try:
        with untouched(dense.model):
            # What a run writes is seen here: runs that wait for each other are not watched.
            used = run_order(dense.model, batches[0], parameters)
            order = [n for n in used if _solvable(by_name[n], chosen[n], dense.spectra[n])]
            together = _together(sites, order)
            order = [name for name in order if name in together]
            for batch in batches:
                given = dense.model, batch, parameters, order
                runs.append((WeightRun(*given, None), WeightRun(*given, compressed)))
            moments: Moments | None = None
            for done, name in enumerate(order):
                dense.progress("refit", done, len(order))
                there = [pair for pair in runs if all(one.reach(done) for one in pair)]
                masks = [_counted(dense.counted, pair[0].batch, together[name]) for pair in there]
                if moments is None or not moments.are_of(there, masks):
                    moments = moments_of(by_name[name], there, masks)
                if moments.seen:
                    group = {n: dense.spectra[n] for n in together[name]}
                    weights = [as_matrix(c.site, parameters[n].detach()) for n, c in group.items()]
                    wanted = [chosen[n].spec for n in group]
                    solved = moments.solve(weights, list(group.values()), wanted)
                    cores.update(zip(group, solved, strict=True))
                give_back(by_name[name].parameters)
    finally:
        for pair in runs:
            for one in pair:
                one.stop()
    use_planned(*specs)
    dense.progress("refit", len(order), len(order))
    return cores


def _together(sites: Sequence[RankPlan], order: Sequence[str]) -> dict[str, list[str]]:
    """The first used of weights with a common first factor → all of them; one alone: itself.

    Where one of them cannot be solved, none of its group is.
    """
    groups: dict[str, list[str]] = {}
    for choice in sites:
        if choice.spec is not None:
            groups.setdefault(choice.shared or choice.name, []).append(choice.name)
    used = {name: place for place, name in enumerate(order)}
    solvable = [names for names in groups.values() if all(name in used for name in names)]
    return {min(names, key=used.__getitem__): names for names in solvable}


def _solvable(site: Site, choice: RankPlan, curve: Spectrum) -> bool:
    """Whether it is a low-rank weight that is not exact already.

    Complex ones keep what is planned. One that some of the data use in another way has several
    metrics, and no single best map.
    """
    assert choice.spec is not None
    if site.experts or site.last_resort or site.reals > 1 or len(curve.metrics) > 1:
        return False
    if choice.spec.precision is not None:
        return True
    # With a first factor in common, a rank as large as the weight's own is not exact.
    exact = choice.shared is None and choice.ranks[0] >= min(site.matrix)
    return format_of(choice.spec).spectral and not exact


class Moments:
    """K = Σ x x̃ᵀ (``cross``) and C̃ = Σ x̃ x̃ᵀ (``own``) of one weight, in float64, and of others of
    the same input."""

    def __init__(
        self,
        site: Site,
        runs: Sequence[tuple[WeightRun, WeightRun]],
        masks: Sequence[Tensor | None],
    ) -> None:
        self.site, self.count = site, 0
        self.cross: Tensor | None = None
        self.own: Tensor | None = None
        self.contract = "columns"
        self._inputs, self._masks = _inputs(runs), masks
        for pair, mask in zip(runs, masks, strict=True):
            self._add(*pair, mask)

    def are_of(
        self, runs: Sequence[tuple[WeightRun, WeightRun]], masks: Sequence[Tensor | None]
    ) -> bool:
        """Whether the runs wait with products of the very same inputs, of which the same count."""
        return _inputs(runs)[1] == self._inputs[1] and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(masks, self._masks, strict=True)
        )

    def _add(self, dense: WeightRun, small: WeightRun, mask: Tensor | None) -> None:
        assert dense.matmul is not None
        assert small.matmul is not None
        if self.count == 0:
            self.contract = dense.matmul.contract
        if {dense.matmul.contract, small.matmul.contract} != {self.contract}:
            return  # a batch that uses it in another way than those before
        x, seen = input_rows(self.site, dense.matmul), input_rows(self.site, small.matmul)
        if x is None or seen is None or x.shape != seen.shape:
            return  # rows of a convolution in three dimensions; a model that takes another way
        if mask is not None and len(mask) == len(x):
            x, seen = x[mask], seen[mask]
        self.cross = plus(self.cross, products(x, seen))
        self.own = plus(self.own, products(seen))
        self.count += len(x)

    @property
    def seen(self) -> bool:
        """Whether anything but zeros arrived in the compressed model, and nothing infinite."""
        return self.own is not None and 0 < float(self.own.diagonal().sum()) < math.inf

    def solve(
        self, weights: Sequence[Tensor], curves: Sequence[Spectrum], specs: Sequence[Any]
    ) -> list[Cores]:
        """The best factors of the maps that take x̃ to W x; several have one first factor.

        Where a spec says so they are rounded, and then the weights after it see that.
        """
        rows = self.contract == "rows"
        factor, cross = self._damped
        matrices = [(weight.t() if rows else weight).double() for weight in weights]
        # K C̃⁻¹ is one for all weights of an input; for few rows W K C̃⁻¹ from the left is less work.
        if sum(map(len, matrices)) >= len(factor):
            maps = [matrix @ self._transfer for matrix in matrices]
        else:
            maps = [torch.cholesky_solve((m @ cross).t(), factor).t() for m in matrices]
        targets = [m.to(w.dtype) for m, w in zip(maps, weights, strict=True)]
        metrics = []
        for curve in curves:
            (metric,) = curve.metrics
            outputs = metric.right if rows else metric.left
            metrics.append(Metric(metric.scale, outputs, factor.float()))
        if len(targets) > 1:
            shared, reader = joint_factors(targets, metrics, specs[0].ranks[0])
            shared = shared.to(targets[0].dtype)
            return [((t.double() @ reader).to(t.dtype), shared) for t in targets]
        (target,), (metric,), (spec,) = targets, metrics, specs
        if rows:
            target, metric = target.t(), metric.transposed()
        cores = (target,) if is_dense(spec.format) else best_factors(target, metric, *spec.ranks)
        if spec.precision is not None:
            return [quantized(spec, cores, (metric,), weights[0].dtype)]
        return [cores]

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of C̃, and K; what is added to both is noise that both models see."""
        assert self.cross is not None
        assert self.own is not None
        mean = float(self.own.diagonal().mean())
        share = shrinkage(self.own, self.count)
        cross, own = (shrink(moment, share, mean) for moment in (self.cross, self.own))
        return torch.linalg.cholesky(own), cross

    @cached_property
    def _transfer(self) -> Tensor:
        """K C̃⁻¹."""
        factor, cross = self._damped
        return torch.cholesky_solve(cross.t(), factor).t()


def _counted(
    counted: Mapping[Batch, Counted] | None, batch: Batch, names: Sequence[str]
) -> Tensor | None:
    """The rows of a batch that count for one of these weights at least; None: all do."""
    masks = [rows_of(counted, batch, name, 0) for name in names]
    known = [mask for mask in masks if mask is not None]
    return torch.stack(known).any(0) if len(known) == len(masks) else None


def _inputs(runs: Sequence[tuple[WeightRun, WeightRun]]) -> tuple[list[Tensor], list[object]]:
    """What a weight is multiplied with in every run, and what tells whether another's is the same.

    While the first are held, none of their numbers is given to another tensor.
    """
    matmuls = [one.matmul for pair in runs for one in pair if one.matmul is not None]
    same: list[object] = []
    for matmul in matmuls:
        if matmul.convolution is not None or matmul.x.is_inference():
            # Patches depend on the weight's shape; writes in place are not always counted.
            same.append(object())
        else:
            same.append((id(matmul.x), matmul.x._version, matmul.contract))
    return [matmul.x for matmul in matmuls], same
