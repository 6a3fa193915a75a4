"""MPIFA (Zhao et al., ICML 2025): low rank solved again without training, and stored without an
identity.

Each weight begins as SVD-LLM cuts it, at the rank that PIFA pays for. Then weights are taken in the
order of their use. With the inputs x̃ that the compressed model has at one, and x of the dense
model, the outputs aimed at are a mixture of both, λ W x + (1 - λ) W x̃: U is solved for them by
least squares, then V for this U, held near W by a small share of ‖ΔW‖². λ is their .25, the share
their .001, and there is one step of each, as in their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from tensorize import Analysis, Plan
from tensorize.formats.registry import format_of
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.rewrite.drift import Drift
from tensorize.passes.rewrite.factorize import Cores
from tensorize.passes.rewrite.refit import refit
from tensorize.passes.stages import Opened, Planned
from tensorize.weight.install import resize

MIXED, HELD = 0.25, 1e-3


def _solved(
    seen: Drift, weights: Sequence[Tensor], curves: Sequence[Spectrum], specs: Sequence[Any]
) -> list[Cores]:
    """Solves weights' factors for the outputs of both models."""
    each = zip(weights, curves, specs, strict=True)
    return [_one(seen, weight, curve, spec) for weight, curve, spec in each]


def _one(seen: Drift, weight: Tensor, curve: Spectrum, spec: Any) -> Cores:
    rows, (own, change) = seen.contract == "rows", seen.all
    left, right = (core.double() for core in curve.factors(spec, weight))
    matrix = weight.double()
    if rows:
        matrix, left, right = matrix.mT, right.mT, left.mT
    left, right = reconstructed(matrix, right, own + change, own)
    if rows:
        left, right = right.mT, left.mT
    return left.to(weight.dtype), right.to(weight.dtype)


def reconstructed(
    matrix: Tensor, right: Tensor, cross: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """U (M, R) and V (R, N) for W (M, N) and a first V, K = Σ x x̃ᵀ and C̃ = Σ x̃ x̃ᵀ (N, N)."""
    wanted = MIXED * matrix @ cross + (1 - MIXED) * matrix @ own
    left = torch.linalg.solve(right @ own @ right.mT, wanted @ right.mT, left=False)
    held = HELD * torch.eye(len(own), dtype=own.dtype)
    best = torch.linalg.solve(own + held, wanted + HELD * matrix, left=False)
    return left, torch.linalg.lstsq(left, best).solution


@torch.no_grad()
def with_reconstruction(analysis: Analysis, model: nn.Module, plan: Plan) -> nn.Module:
    """The model of a plan of low rank whose factors are solved again."""
    dense = analysis.program.to(Planned, plan=plan.alone).to(Opened, model=model)
    cores = refit(dense, plan.sites, analysis.calibration, _solved)
    small = tensorize.apply(model, plan, progress=False)
    for choice in plan.sites:
        if choice.spec is not None:
            form, dtype = format_of(choice.spec), model.get_parameter(choice.name).dtype
            made = form.stored(choice.spec, cores[choice.name], dtype)
            count = len(choice.spec.core_shapes)
            held: list[Any] = [nn.Parameter(core.contiguous()) for core in made[:count]]
            resize(small, choice.name, form.as_stored(choice.spec, made), [*held, *made[count:]])
    return small
