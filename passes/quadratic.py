"""What an error of a weight really costs to second order, where the metric takes it as a product.

The ``loss`` metric is a Kronecker product: it takes inputs and gradients as independent of each
other, and the rows of one sequence too. Neither holds: a token's gradient depends on what the token
is, and where outputs are pooled over a sequence its rows pull the same way. The full quadratic of
one weight, ½ E[⟨∇W, ΔW⟩²] over sequences, needs no such assumption. For errors ΔW of a few sizes,
those that compression would make, it is estimated for all weights in the same backward passes, and
the curves are read through the ratio. Which factors are best is still the metric's to say.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tensorize.ir import Batch, TTSpec
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import PreservedLoss
from tensorize.passes.spectra import Spectrum, as_matrix
from tensorize.passes.statistics import backward, matmul_rows
from tensorize.uses import Frame, Matmul

LEVELS = (0.5,)
"""Shares of a weight's parameters at which its error is tried: where second order still holds."""
_PROBES = 2
# How far the logarithm of the ratio is from 0 before anything is measured (one sigma).
_PRIOR = 0.5


@dataclass(frozen=True)
class MeasureQuadratic:
    """Program whose curves know the full quadratic of their weight at some points."""

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    name: str = "quadratic"

    def run(self, program: Program) -> Program:
        curves = {name: c for name, c in program.spectra.items() if _is_plain(c)}
        if program.metric != "loss" or self.loss is None or not curves:
            return replace(program, summary="the metric alone")
        parameters = dict(program.model.named_parameters())
        errors = {
            name: _errors(curve, as_matrix(curve.site, parameters[name].detach()))
            for name, curve in curves.items()
        }
        wanted = [(name, parameters[name]) for name in curves]
        squares: dict[str, Tensor] = {}
        samples: dict[str, int] = defaultdict(int)
        rows, total = 0, _PROBES * len(self.batches)
        generator = torch.Generator().manual_seed(program.seed)
        for done in range(total):
            program.progress("quadratic", done, total)
            position = done % len(self.batches)
            batch = self.batches[position]
            products = _Products(curves, errors, _sequences(batch))
            rows += backward(
                program.model, batch, position, wanted, products.add, self.loss, generator
            )
            for name, found in products.sums.items():
                square = found.square().sum(0)
                squares[name] = squares[name] + square if name in squares else square
                samples[name] += int((found != 0).any(1).sum())
        program.progress("quadratic", total, total)
        spectra = dict(program.spectra)
        ratios = []
        for name, square in squares.items():
            knots = _knots(errors[name], square / (2 * max(rows, 1)), samples[name])
            spectra[name] = replace(curves[name], knots=knots)
            ratios += [cost / lost for lost, cost in knots]
        spread = f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else "nothing"
        summary = f"{len(squares)} weights, {spread} of what the metric says"
        return replace(program, spectra=spectra, summary=summary)


def _is_plain(curve: Spectrum) -> bool:
    site = curve.site
    return curve.in_nats and not site.experts and not site.last_resort


@dataclass(frozen=True)
class _Error:
    """ΔW = U V − W of a weight at some rank, and what the metric says that it loses.

    It is never built: the analysis holds U and V, the model W.
    """

    lost: float
    left: Tensor
    right: Tensor
    weight: Tensor

    def of(self, x: Tensor, contract: str, rows: slice) -> Tensor:
        """What ΔW adds to the outputs of input rows x; ``rows`` of it are in use."""
        left, weight = self.left[rows].to(x.device), self.weight[rows]
        right = self.right.to(x.device)
        if contract == "lookup":
            return left[x] @ right - weight[x].to(right.dtype)
        x, weight = x.to(right.dtype), weight.to(right.dtype)  # the model may be in half precision
        if contract == "columns":
            return (x @ right.t()) @ left.t() - x @ weight.t()
        return (x @ left) @ right - x @ weight


def _errors(curve: Spectrum, weight: Tensor) -> list[_Error]:
    m, n = curve.site.matrix
    found: dict[int, _Error] = {}
    for level in LEVELS:
        rank = max(1, int(level * m * n / (m + n)))
        lost = curve.distortion_of(TTSpec.low_rank(m, n, rank))
        if lost > 0 and rank <= curve.left.shape[-1]:
            left, right = curve.left[:, :rank], curve.right[:rank]
            found[rank] = _Error(lost, left, right, weight)
    return list(found.values())


def _sequences(batch: Batch) -> int:
    """How many sequences a batch holds: the first axis of the first tensor given."""
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    return next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0), 1)


class _Products:
    """⟨∇W, ΔW⟩ of every weight and every ΔW, by sequence: ``sums`` holds (sequences, errors)."""

    def __init__(
        self,
        curves: dict[str, Spectrum],
        errors: dict[str, list[_Error]],
        sequences: int,
    ) -> None:
        self.curves, self.errors, self.sequences = curves, errors, sequences
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, frame: Frame, matmul: Matmul, gradient: Tensor) -> None:
        x, g = matmul_rows(self.curves[name].site, matmul, gradient)
        if x is None or g is None or not self.errors[name]:
            return
        shown = slice(None) if frame.rows is None else slice(*frame.rows)
        products = []
        for error in self.errors[name]:
            y = error.of(x, matmul.contract, shown)
            products.append((y * g).sum(-1, dtype=torch.float64))
        found = self._by_sequence(torch.stack(products, 1), matmul)
        before = self.sums.get(name)
        if before is not None and len(before) != len(found):  # of uses that see other rows
            before, found = before.sum(0, keepdim=True), found.sum(0, keepdim=True)
        self.sums[name] = found if before is None else before + found

    def _by_sequence(self, products: Tensor, matmul: Matmul) -> Tensor:
        """Sums over the rows of each sequence; over all where rows do not tell theirs."""
        count, lead = self.sequences, matmul.x.shape[0] if matmul.x.dim() else 0
        flat = matmul.x.dim() == 2 and matmul.contract != "lookup"
        if len(products) % max(count, 1) == 0 and (lead == count or flat) and matmul.bag is None:
            return products.view(count, -1, products.shape[1]).sum(1)
        return products.sum(0, keepdim=True)


def _knots(errors: list[_Error], costs: Tensor, samples: int) -> tuple[tuple[float, float], ...]:
    """(distortion in the metric, cost), by growing distortion; never falling.

    The variance of the logarithm of a mean of n squares is about 2 / n: few samples say little.
    """
    trust = 1 / (1 + 2 / (max(samples, 1) * _PRIOR**2))
    knots: list[tuple[float, float]] = []
    for error, cost in sorted(zip(errors, costs.tolist(), strict=True), key=lambda p: p[0].lost):
        ratio = max(cost / error.lost, 1e-3) ** trust
        knots.append((error.lost, max(error.lost * ratio, knots[-1][1] if knots else 0.0)))
    return tuple(knots)
