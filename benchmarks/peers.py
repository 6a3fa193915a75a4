"""What others do, on our engine: the same truncated decompositions, each method's own choices.

Only what sets a method apart is written here: how it weighs an error, and how it spreads a budget.
Everything else (sites, moments of the same calibration data, decompositions, evaluation) is shared,
so that a difference between two rows of a table is a difference between two methods.

=============  ===================================================================================
SVD            plain SVD, the same share of every weight
relative SVD   plain SVD, one multiplier over relative errors ‖ΔW‖²/‖W‖²
ASVD           columns scaled by the inputs' mean size to the power ½ (Yuan et al. 2023), uniform
SVD-LLM        whitened by the inputs' second moment (Wang et al. 2024), uniform
K-FAC SVD      two-sided; the rise of the loss measured for every weight alone at some ranks, and
               the ranks of all chosen by an integer program over those measurements (as LEMS does)
TT             a balanced tensor train of two cores by TT-SVD (as tltorch's), uniform
=============  ===================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import tensorize
from tensorize import Analysis, Plan, tt
from tensorize.passes.metric import Metric
from tensorize.passes.optimise import minimise_distortion
from tensorize.passes.points import COSTS, Points
from tensorize.passes.preserved import divergence
from tensorize.passes.spectra import Spectrum, spectrum

LEVELS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Shares of a weight's parameters at which the K-FAC SVD measures it alone."""

Distance = Callable[[Mapping[str, Tensor]], float]
"""How far a model is off, on calibration data, with some weights replaced (by name)."""


@dataclass
class Peers:
    """The analyses that the methods need, of one model and its calibration data."""

    model: nn.Module
    plain: Analysis
    whitened: Analysis
    two_sided: Analysis
    distance: Distance

    def plans(self) -> dict[str, Callable[[float], Plan]]:
        """Method → budget → plan."""
        sensitivity: list[Points] = []

        def kfac(budget: float) -> Plan:
            if not sensitivity:
                sensitivity.extend(measured_points(self.two_sided, self.model, self.distance))
            return integer_plan(self.two_sided, self.model, sensitivity, budget)

        scaled = with_metrics(self.whitened, self.model, _activation_scale)
        trains = tensorize.analyze(self.model, formats="tt", progress=False)
        return {
            "SVD": lambda b: uniform_plan(self.plain, self.model, b),
            "relative SVD": lambda b: compared(self.plain, 1.0).plan(b, refine=None),
            "ASVD": lambda b: uniform_plan(scaled, self.model, b),
            "SVD-LLM": lambda b: uniform_plan(self.whitened, self.model, b),
            "K-FAC SVD": kfac,
            "TT": lambda b: uniform_plan(trains, self.model, b),
        }


def free_sites(analysis: Analysis) -> list[tensorize.Site]:
    sites = analysis.program.sites
    return [site for site in sites if site.blocked is None and site.last_resort is None]


def uniform_plan(analysis: Analysis, model: nn.Module, budget: float) -> Plan:
    """The same share of parameters for every weight, at most ``budget`` in all.

    A weight whose share is more than any rank can save stays dense.
    """
    sites = free_sites(analysis)
    whole = sum(p.numel() for p in model.parameters())
    fixed = whole - sum(site.parameters for site in sites)
    share = (budget * whole - fixed) / (whole - fixed)
    ranks: dict[str, int | str] = {}
    for site in sites:
        m, n = site.matrix
        curve: Spectrum = analysis.program.spectra[site.name]
        if curve.trains and "low_rank" not in curve.formats:
            split = curve.trains[0].spec
            costs = {r: split.with_ranks([r]).parameters for r in range(1, split.ranks[0] + 1)}
            fitting = [r for r, cost in costs.items() if cost <= share * m * n]
            ranks[site.name] = max(fitting, default=1)
        else:
            ranks[site.name] = max(1, int(share * m * n / (m + n)))
    return analysis.plan(None, ranks=ranks, refine=None)


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
    analysis: Analysis, model: nn.Module, metric: Callable[[Spectrum], Metric]
) -> Analysis:
    """The curves of the same weights in another metric."""
    parameters = dict(model.named_parameters())
    spectra = {}
    for name, curve in analysis.program.spectra.items():
        weight = parameters[name].detach().reshape(curve.site.matrix)
        spectra[name] = spectrum(curve.site, weight, (metric(curve),), curve.formats)
    return replace(analysis, program=replace(analysis.program, spectra=spectra))


def _activation_scale(curve: Spectrum) -> Metric:
    """Input channels weighed by the square root of their root mean square."""

    def scale(root: Tensor | None) -> Tensor | None:
        if root is None:
            return None
        second = root.square() if root.dim() == 1 else root.square().sum(1)
        return second.clamp_min(1e-12) ** 0.25

    known = curve.metrics[0]
    return Metric(1.0, scale(known.left), scale(known.right))


def measured_points(analysis: Analysis, model: nn.Module, distance: Distance) -> list[Points]:
    """Every weight alone at some ranks: what it costs, and how far the model is then off."""
    parameters = dict(model.named_parameters())
    points: list[Points] = []
    for site in free_sites(analysis):
        m, n = site.matrix
        curve: Spectrum = analysis.program.spectra[site.name]
        ranks = sorted({max(1, int(level * m * n / (m + n))) for level in LEVELS})
        lost = []
        dense = parameters[site.name].detach()
        for rank in ranks:
            spec = tensorize.TTSpec.low_rank(m, n, rank)
            weight = tt.reconstruct(spec, curve.factors(spec, dense.reshape(m, n)))
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
    choice = minimise_distortion(points, caps)
    ranks: dict[str, int | str] = {
        point.site.name: int(point.labels[k])
        for point, k in zip(points, choice, strict=True)
        if point.labels[k] > 0
    }
    return analysis.plan(None, ranks=ranks, refine=None)


@torch.no_grad()
def kl_distance(model: nn.Module, batches: Sequence[Tensor]) -> Distance:
    """Mean KL of the logits to the dense model's, in nats a token."""
    dense = [model(batch).logits for batch in batches]
    tokens = sum(batch.numel() for batch in batches)

    @torch.no_grad()
    def distance(weights: Mapping[str, Tensor]) -> float:
        total = 0.0
        for batch, before in zip(batches, dense, strict=True):
            after = functional_call(model, dict(weights), (batch,)).logits
            total += float(divergence(before, after))
        return total / tokens

    return distance
