"""Sequential refit: every weight's factors solved again on the inputs that it will really see.

The one-shot factors are best for the dense model's inputs. In the compressed model a weight sees
inputs x̃ that the weights before it have changed, while its outputs should still be those of the
dense model, W x. So weights are taken in the order of their use, and the best factors are those of
a map that takes x̃ to W x (``drift.py``). No gradients are needed.

All of it is one pass: every calibration batch runs through the dense and through the compressed
model at once, and waits at each weight until that weight is solved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
from tensorize.passes.observe.counted import Counted, rows_of
from tensorize.passes.observe.rows import input_rows
from tensorize.passes.rewrite.drift import Drift, Pair
from tensorize.passes.rewrite.factorize import Cores, planned_cores, quantized, stand_in
from tensorize.passes.rewrite.runs import WeightRun, run_order
from tensorize.passes.rewrite.sequence import in_order
from tensorize.passes.stages import Dense, Opened

Solve = Callable[[Drift, Sequence[Tensor], Sequence[Spectrum], Sequence[Any]], list[Cores]]
"""The cores of weights of one input, by their curves and specs; several have one first factor."""


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
    solve: Solve | None = None,
) -> dict[str, Cores]:
    """The cores of a plan, those of plain low-rank weights solved again: by ``solve``."""
    return refit_part(dense, sites, dense.model, [(batch, batch) for batch in batches], solve)


@torch.no_grad()
def refit_part(
    dense: Dense,
    sites: Sequence[RankPlan],
    part: nn.Module,
    batches: Sequence[tuple[Batch, Batch]],
    solve: Solve | None = None,
) -> dict[str, Cores]:
    """The same of weights of a part of the model, by runs of that part.

    ``batches``: what it is given in the dense model, and in the small one.
    """
    solve = solve or best_on_what_is_seen
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

    with untouched(part):
        # What a run writes is seen here: runs that wait for each other are not watched.
        used = run_order(part, batches[0][0], parameters)
        order = [n for n in used if _solvable(by_name[n], chosen[n], dense.spectra[n])]
        together = _together(sites, order)
        order = [name for name in order if name in together]

        def pair(given: tuple[Batch, Batch]) -> Pair:
            whole, small = given
            return (
                WeightRun(part, whole, parameters, order, None),
                WeightRun(part, small, parameters, order, compressed),
            )

        def masks(batch: Batch, name: str) -> Tensor | None:
            return _counted(dense.counted, batch, together[name])

        rows = {name: partial(input_rows, by_name[name]) for name in order}
        with contextlib.closing(in_order(order, batches, pair, rows, masks)) as turns:
            for done, (name, drift) in enumerate(turns):
                dense.progress("refit", done, len(order))
                give_back(by_name[name].parameters)  # what the runs freed on their way here
                if drift.seen:
                    group = {n: dense.spectra[n] for n in together[name]}
                    weights = [as_matrix(c.site, parameters[n].detach()) for n, c in group.items()]
                    wanted = [chosen[n].spec for n in group]
                    solved = solve(drift, weights, list(group.values()), wanted)
                    cores.update(zip(group, solved, strict=True))
                give_back(by_name[name].parameters)
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


def best_on_what_is_seen(
    drift: Drift, weights: Sequence[Tensor], curves: Sequence[Spectrum], specs: Sequence[Any]
) -> list[Cores]:
    """The best factors of the maps that take x̃ to W x; several have one first factor.

    Where a spec says so they are rounded, and then the weights after it see that.
    """
    rows = drift.contract == "rows"
    own = [curve.metrics[0] for curve in curves]
    roots = [metric.right if rows else metric.left for metric in own]
    targets, factor = drift.towards([weight.t() if rows else weight for weight in weights], roots)
    inputs = factor.float()
    metrics = [Metric(each.scale, root, inputs) for each, root in zip(own, roots, strict=True)]
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


def _counted(
    counted: Mapping[Batch, Counted] | None, batch: Batch, names: Sequence[str]
) -> Tensor | None:
    """The rows of a batch that count for one of these weights at least; None: all do."""
    masks = [rows_of(counted, batch, name, 0) for name in names]
    known = [mask for mask in masks if mask is not None]
    return torch.stack(known).any(0) if len(known) == len(masks) else None
