"""What others do, on our engine: the same truncated decompositions, each method's own choices.

Only what sets a method apart is written here: how it weighs an error, and how it spreads a budget.
Everything else (sites, moments of the same calibration data, decompositions, evaluation) is shared,
so that a difference between two rows of a table is a difference between two methods.

=============  ===================================================================================
SVD            plain SVD, the same share of every weight
relative SVD   plain SVD, one multiplier over relative errors ‖ΔW‖²/‖W‖²
ASVD           columns scaled by the inputs' mean size to the power ½ (Yuan et al. 2023), uniform
SVD-LLM        whitened by the inputs' second moment (Wang et al. 2024), uniform
PIFA           the same without the numbers of an identity (Zhao et al. 2025), which buys larger
               ranks
MPIFA          the same, solved again on the compressed model's inputs (``benchmarks/mpifa.py``)
K-FAC SVD      two-sided, rows taken as independent; the rise of the loss measured for every weight
               alone at some ranks, and the ranks of all chosen by an integer program over those
               measurements (as LEMS does)
TT             a balanced tensor train of two cores, uniform; made by tltorch itself
=============  ===================================================================================

tltorch's weights are those of our own TT-SVD, to rounding: on gpt, a quarter kept, KL 5.8624 and
5.8623.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tensorize
from benchmarks.mpifa import with_reconstruction
from tensorize import Analysis, Plan
from tensorize.algebra.metric import Metric
from tensorize.algebra.modes import balanced_modes
from tensorize.algebra.reconstruct import reconstruct
from tensorize.api.analysis import AnalysedPlan
from tensorize.api.options import Options
from tensorize.capture.inputs import batch_of
from tensorize.formats.registry import format_of
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.choose import Tiers
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.metric import site_metrics
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.observe.loss import PreservedLoss, split
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.pipeline import run_passes
from tensorize.passes.stages import Found, Planned

LEVELS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Shares of a weight's parameters at which the K-FAC SVD measures it alone."""

Distance = Callable[[Mapping[str, Tensor]], float]
"""How far a model is off, on calibration data, with some weights replaced (by name)."""


@dataclass(frozen=True)
class Compressed:
    """A smaller model, its share of the parameters, and the prediction where there is one."""

    model: nn.Module
    parameters: float
    predicted: tensorize.Prediction | None = None


Method = Callable[[float], Compressed]


@dataclass
class Peers:
    """The analyses that the methods need, of one model and its calibration data."""

    model: nn.Module
    plain: Analysis
    whitened: Analysis
    two_sided: Analysis
    calibration: Sequence[Any]
    distance: Distance | None
    """What measures single weights; None: it takes too long, and so does what is chosen by it."""

    def methods(self) -> dict[str, Method]:
        """Method → budget → smaller model."""
        scaled = with_metrics(self.whitened, self.model, _activation_scale)
        model = self.model
        plans: dict[str, Callable[[float], Plan]] = {
            "SVD": lambda b: uniform_plan(self.plain, model, b),
            "relative SVD": lambda b: whole_factors(
                compared(self.plain, 1.0), budget=b, formats=("dense", "low_rank")
            ),
            "ASVD": lambda b: uniform_plan(scaled, model, b),
            "SVD-LLM": lambda b: uniform_plan(self.whitened, model, b),
            "PIFA": lambda b: uniform_plan(self.whitened, model, b, pivots=True),
        }
        if self.distance is not None:
            independent = kfac(self.two_sided, self.model, self.calibration)
            sensed = measured_points(independent, self.model, self.distance)
            plans["K-FAC SVD"] = lambda b: integer_plan(independent, model, sensed, b)
        found = {name: applied(model, plan_for) for name, plan_for in plans.items()}
        found["MPIFA"] = self._mpifa
        return {**found, "TT": partial(tensor_trains, self.plain, model)}

    def _mpifa(self, budget: float) -> Compressed:
        plan = uniform_plan(self.whitened, self.model, budget, pivots=True)
        small = with_reconstruction(self.whitened, self.model, plan)
        return Compressed(small, plan.predicted.parameters / plan.dense.parameters)


def applied(model: nn.Module, plan_for: Callable[[float], Plan]) -> Method:
    """The method that puts plans into effect."""

    def compress(budget: float) -> Compressed:
        plan = plan_for(budget)
        small = tensorize.apply(model, plan, progress=False)
        share = plan.predicted.parameters / plan.dense.parameters
        return Compressed(small, share, plan.predicted)

    return compress


def free_sites(analysis: Analysis) -> list[tensorize.Site]:
    sites = analysis.program.sites
    return [site for site in sites if site.blocked is None and site.last_resort is None]


def uniform_share(sites: Sequence[tensorize.Site], model: nn.Module, budget: float) -> float:
    """The share of these weights' parameters that keeps ``budget`` of the whole model's."""
    whole = sum(p.numel() for p in model.parameters())
    fixed = whole - sum(site.parameters for site in sites)
    return (budget * whole - fixed) / (whole - fixed)


def whole_factors(analysis: Analysis, **options: Any) -> Plan:
    """A plan of factors that are stored whole, as other methods have them."""
    asked = Options.of({"budget": None, "refine": None, **options})
    allocate = replace(analysis._allocation(asked), pivots=False)
    plan = run_passes(analysis.program, (allocate,), Planned).plan
    return AnalysedPlan(**vars(plan), analysis=analysis)


def uniform_plan(
    analysis: Analysis, model: nn.Module, budget: float, *, pivots: bool = False
) -> Plan:
    """The same share of parameters for every weight, at most ``budget`` in all.

    A weight whose share is more than any rank can save stays dense. ``pivots``: no identity is
    stored.
    """
    sites = free_sites(analysis)
    share = uniform_share(sites, model, budget)
    if pivots:
        sizes = [(site.name, *site.matrix) for site in sites]
        exact = {
            name: (m + n - math.sqrt((m + n) ** 2 - 4 * share * m * n)) / 2 for name, m, n in sizes
        }
        return analysis.plan(None, ranks={n: max(1, int(r)) for n, r in exact.items()}, refine=None)
    ranks: dict[str, int | str] = {site.name: level_rank(site, share) for site in sites}
    return whole_factors(analysis, ranks=ranks)


def tltorch() -> Any:
    """The package tensorly-torch.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import tltorch as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(
            f"the tensor trains to compare with are tltorch's ({error}): "
            "pip install -c constraints.txt -e '.[bench]'"
        ) from error
    return package


@torch.no_grad()
def tensor_trains(analysis: Analysis, model: nn.Module, budget: float) -> Compressed:
    """Every weight as tltorch's tensor train of two cores, all with the same share.

    The model holds the weights that the trains stand for: what is compared is what they lose.
    """
    sites = free_sites(analysis)
    share = uniform_share(sites, model, budget)
    small = copy.deepcopy(model)
    parameters = dict(small.named_parameters())
    kept = sum(p.numel() for p in parameters.values())
    whole = kept
    for site in sites:
        m, n = site.matrix
        rows, columns = balanced_modes(m, 2), balanced_modes(n, 2)[::-1]
        sizes = [a * b for a, b in zip(rows, columns, strict=True)]
        rank = min(max(1, int(share * m * n / sum(sizes))), *sizes)
        weight = parameters[site.name]
        train = tltorch().TensorizedTensor.from_matrix(
            weight.reshape(m, n), rows, columns, rank=(1, rank, 1), factorization="blocktt"
        )
        kept += sum(factor.numel() for factor in train.factors) - m * n
        weight.copy_(train.to_matrix().reshape(weight.shape))
    return Compressed(small, kept / whole)


@torch.no_grad()
def rounded_trains(analysis: Analysis, model: nn.Module, budget: float) -> Compressed:
    """The trains of our plan as the TT-SVD leaves them, not improved in the metric.

    The model holds the weights that the trains stand for.
    """
    plan = analysis.plan(budget, refine=None)
    small = copy.deepcopy(model)
    parameters = dict(small.named_parameters())
    for choice in plan.sites:
        if choice.spec is None:
            continue
        modes = choice.spec.row_modes, choice.spec.column_modes
        trains = analysis.program.spectra[choice.name].trains
        train = next(t for t in trains if (t.spec.row_modes, t.spec.column_modes) == modes)
        spec, cores = format_of(train.spec).rounded(train, choice.spec.ranks)
        weight = parameters[choice.name]
        weight.copy_(reconstruct(spec, cores).reshape(weight.shape))
    return Compressed(small, plan.predicted.parameters / plan.dense.parameters)


def compared(analysis: Analysis, exponent: float) -> Analysis:
    """The same curves, divided by each weight's own size ** exponent, to be added up as they are.

    0 compares absolute errors of different weights, 1 relative ones.
    """
    spectra = {}
    for name, curve in analysis.program.spectra.items():
        whole = float(curve.distortion[0])
        unit = whole**exponent if whole > 0 else 1.0
        spectra[name] = replace(
            curve,
            distortion=curve.distortion / unit,
            train_points=tuple((spec, lost / unit) for spec, lost in curve.train_points),
            in_nats=True,
        )
    return replace(analysis, program=replace(analysis.program, spectra=spectra))


def with_metrics(
    analysis: Analysis, model: nn.Module, metrics: Callable[[Spectrum], tuple[Metric, ...]]
) -> Analysis:
    """The curves of the same weights in another metric."""
    parameters = dict(model.named_parameters())
    spectra = {}
    for name, curve in analysis.program.spectra.items():
        weight = parameters[name].detach().reshape(curve.site.matrix)
        spectra[name] = spectrum(curve.site, weight, metrics(curve), curve.formats)
    return replace(analysis, program=replace(analysis.program, spectra=spectra))


def kfac(analysis: Analysis, model: nn.Module, calibration: Sequence[Any]) -> Analysis:
    """The curves in the metric of K-FAC, of the data that the analysis learnt from."""
    batches = analysis.calibration or tuple(map(batch_of, calibration))
    loss = PreservedLoss.fit(model, batches, None)
    learn = CollectStatistics(split(batches)[0], loss, by_sample=False)
    moments = learn.run(analysis.program.to(Found, model=model)).statistics
    return with_metrics(
        analysis, model, lambda c: site_metrics(c.site, moments[c.site.name], "loss")
    )


def _activation_scale(curve: Spectrum) -> tuple[Metric, ...]:
    """Input channels weighed by the square root of their root mean square."""

    def scale(root: Tensor | None) -> Tensor | None:
        if root is None:
            return None
        second = root.square() if root.dim() == 1 else root.square().sum(1)
        return second.clamp_min(1e-12) ** 0.25

    known = curve.metrics[0]
    return (Metric(1.0, scale(known.left), scale(known.right)),)


def level_rank(site: tensorize.Site, level: float) -> int:
    """The rank that keeps this share of a weight's parameters."""
    m, n = site.matrix
    return max(1, int(level * m * n / (m + n)))


def measured_points(analysis: Analysis, model: nn.Module, distance: Distance) -> list[Points]:
    """Every weight alone at some ranks: what it costs, and how far the model is then off."""
    parameters = dict(model.named_parameters())
    points: list[Points] = []
    for site in free_sites(analysis):
        m, n = site.matrix
        curve: Spectrum = analysis.program.spectra[site.name]
        ranks = sorted({level_rank(site, level) for level in LEVELS})
        lost = []
        dense = parameters[site.name].detach()
        for rank in ranks:
            spec = tensorize.TTSpec.low_rank(m, n, rank)
            weight = reconstruct(spec, curve.factors(spec, dense.reshape(m, n)))
            lost.append(distance({site.name: weight.to(dense.dtype).reshape(dense.shape)}))
        costs = np.array([[rank * (m + n), 0, 0] for rank in ranks] + [[m * n, 0, 0]], dtype=float)
        loss = np.array([*lost, 0.0])
        labels = np.array([*ranks, 0])
        points.append(Points(site, costs, loss, loss, np.zeros(len(loss)), labels))
    return points


def integer_plan(
    analysis: Analysis, model: nn.Module, points: Sequence[Points], budget: float
) -> Plan:
    """The least sum of measured losses within a budget: one of the measured ranks for each."""
    whole = sum(p.numel() for p in model.parameters())
    fixed = whole - sum(point.site.parameters for point in points)
    caps = np.full(len(COSTS), math.inf)
    caps[0] = budget * whole - fixed
    found = Tiers.of([points], [0]).least_lost(caps)
    assert found is not None
    choice = found.choice
    ranks: dict[str, int | str] = {
        point.site.name: int(point.labels[k])
        for point, k in zip(points, choice, strict=True)
        if point.labels[k] > 0
    }
    return whole_factors(analysis, ranks=ranks)
