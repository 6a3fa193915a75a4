"""Programs of weights whose curves are given, and plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tensorize.algebra.metric import Metric
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import DENSE, LOW_RANK
from tensorize.passes.allocate.allocate import Allocate
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.predict.predictor import Predictor
from tensorize.passes.stages import Analysed

BOTH = (DENSE, LOW_RANK)

LINEAR = (Use("linear", "columns"),)


def curve(site: Site, distortion: Sequence[float], in_nats: bool = True) -> Spectrum:
    """A curve that says what it is told."""
    tails = torch.zeros(min(site.matrix) + 1, dtype=torch.float64)
    tails[: len(distortion)] = torch.tensor(distortion, dtype=torch.float64)
    return Spectrum(site, BOTH, (Metric(1.0, None, None),), tails, in_nats=in_nats)


def falling(site: Site, half_life: float = 16.0, size: float = 1.0) -> Spectrum:
    ranks = np.arange(min(site.matrix))
    return curve(site, list(size * 0.5 ** (ranks / half_life)))


def program(
    curves: Sequence[Spectrum], blocked: Sequence[Site] = (), other: int = 0, **changes: Any
) -> Analysed:
    sites = (*(c.site for c in curves), *blocked)
    sizes = {site.name: (site.parameters, 4 * site.parameters) for site in sites}
    if other:
        sizes["bias"] = (other, 4 * other)
    found = Analysed(
        metric="loss",
        sites=sites,
        sizes=sizes,
        spectra={c.site.name: c for c in curves},
        predictor=Predictor((), "nats", held_out=True),
    )
    return replace(found, **changes)


M, N = 512, 384


def linear(name: str, m: int = M, n: int = N, uses: tuple[Use, ...] = LINEAR) -> Site:
    return Site(name, (m, n), "float32", uses)


def plan(made: Analysed, budget: Budget | float | None, **options: Any) -> Plan:
    allocate = Allocate(None if budget is None else Budget.of(budget), **options)
    return allocate.run(made).plan


def model_of(count: int = 6, other: int = 500) -> Analysed:
    curves = [falling(linear(f"w{k}"), 8 + 4 * k, 1 + k % 3) for k in range(count)]
    return program(curves, other=other)


def trained(formats: tuple[str, ...] | None) -> Analysed:
    """A Kronecker-structured weight and one without structure, with their real curves."""
    generator = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(s, generator=generator) for s in ((8, 6), (8, 8), (64, 48)))
    curves = [
        spectrum(linear(name, 64, 48), weight, (Metric(1.0, None, None),), formats)
        for name, weight in {"kronecker": torch.kron(a, b), "noise": noise}.items()
    ]
    return replace(program(curves), predictor=None, metric="frobenius")
