"""Second moments of a weight's two sides: what is kept of them, and the sums they are made of.

Sums are taken and kept in the rows' own precision, half precision as float32: what is added to
them before they are used is a hundredth of them, and diagonals are kept in float64. Of a Hermitian
sum one triangle is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensorize.algebra.triangle import Held, Triangle, add_products, entries, hermitian, packed
from tensorize.base.tensors import squared
from tensorize.ir.sites import LARGEST_FULL_MOMENT, Site

# Gradients of samples, or products of their rows, are held so many elements at a time.
_ELEMENTS = 16_000_000
_SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Products:
    """Σ x xᴴ over rows x (R, N), not made before it is added to others."""

    x: Tensor

    def matrix(self) -> Tensor:
        return products(self.x).cpu()

    def add_to(self, held: Held | None) -> Held:
        """Their sum with what is held (None: nothing yet), in place."""
        if held is None:
            width = self.x.shape[1]
            held = packed(torch.zeros(width, width, dtype=self.x.dtype))
        if self.x.device == held.device:
            add_products(held, self.x)
        else:
            held.add_(self.matrix())
        return held


@dataclass
class Term:
    """Moments of one kind of use of a weight W (M, N).

    E[x xᴴ], Hermitian, where entries are complex. Of a stack whose matrices are judged ``apart``
    there is one for each (E, N, N), of the rows that it meets.

    ``rows`` (M, M) or its diagonal (M,), ``columns`` likewise for N: which of them belongs to the
    inputs and which to the gradients depends on ``contract``. ``None`` stands for the identity.
    Both are sums, over ``input_rows`` rows; of a weight used as a whole, over as many gradients.
    The rows were seen ``probes`` times, with gradients that come from ``output_rows`` rows of the
    model's outputs (0: from as many). Of lookups, ``unseen`` is the share of those to come that
    will be of rows not looked up yet.

    ``pooled`` is the number of samples whose positions were added up first (0: none were), and
    ``squares`` the sum of ‖D Dᵀ‖² over them; ``noise`` is then the relative variance of each side
    that comes of their number.
    """

    contract: str
    held: dict[str, Held] = field(default_factory=dict)
    """The sums of ``rows`` and ``columns``, as they are held."""
    input_rows: int = 0
    output_rows: int = 0
    probes: int = 1
    unseen: float = 0.0
    pooled: int = 0
    squares: float = 0.0
    noise: tuple[float, float] | None = None

    @property
    def rows(self) -> Tensor | None:
        return self._sum("rows")

    @property
    def columns(self) -> Tensor | None:
        return self._sum("columns")

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        return self.rows, self.columns

    def _sum(self, side: str) -> Tensor | None:
        return hermitian(self.held[side]) if side in self.held else None

    def add(self, rows: Tensor | Products | None, columns: Tensor | Products | None) -> None:
        """Add to both sums; None is nothing."""
        for side, part in zip(_SIDES, (rows, columns), strict=True):
            if isinstance(part, Products):
                self.held[side] = part.add_to(self.held.get(side))
            elif part is not None and side in self.held:
                self.held[side].add_(part)
            elif part is not None:
                self.held[side] = packed(part)

    def size(self, side: str) -> float:
        """The trace of a full moment; the sum of all diagonals, or of full moments."""
        held = self.held[side]
        diagonal = held.diagonal() if isinstance(held, Triangle) or held.dim() == 2 else held
        return float(diagonal.sum().real)  # of complex rows the rest is rounding

    @property
    def samples(self) -> tuple[int, int]:
        """Of how many independent vectors ``rows`` and ``columns`` are the moments, about.

        Gradients that come from one row of the outputs count once, however many rows they reach.
        """
        if self.contract == "whole":
            widths = [len(self.held[side]) if side in self.held else 1 for side in _SIDES]
            return self.input_rows * widths[1], self.input_rows * widths[0]
        inputs = self.input_rows // max(self.probes, 1)
        gradients = min(self.input_rows, self.output_rows or self.input_rows)
        return (gradients, inputs) if self.contract == "columns" else (inputs, gradients)


@dataclass
class Moments:
    """The terms of one weight: one a kind of use (a tied weight has several)."""

    terms: dict[str, Term] = field(default_factory=dict)

    def term(self, contract: str, *, pooled: bool = False) -> Term:
        kind = f"{contract}, by sample" if pooled else contract
        return self.terms.setdefault(kind, Term(contract))


def has_moments(site: Site, metric: str) -> bool:
    """Whether a metric asks for moments of a weight: what uses it as a whole has no inputs."""
    return site.blocked is None and (metric == "loss" or not site.last_resort)


def has_full_moments(site: Site) -> bool:
    """Whether both sides are narrow enough for all of their second moments to be kept."""
    return max(site.matrix) <= LARGEST_FULL_MOMENT


def moment_bytes(site: Site, metric: str) -> int:
    """Memory of the second moments of one weight, of all its kinds of uses."""

    wide = 8 if site.dtype in ("float64", "complex128") else 4
    stack = site.reals * (site.experts if site.apart else 1)

    def side(width: int) -> int:
        if width > LARGEST_FULL_MOMENT:
            return stack * 8 * width
        return stack * wide * (width**2 if site.apart else entries(width))

    rows, columns = site.matrix
    total = 0
    for contract in {use.contract for use in site.uses}:
        inputs, outputs = (columns, rows) if contract == "columns" else (rows, columns)
        own = 8 * stack * inputs if contract == "lookup" else side(inputs)
        total += own + (side(outputs) if metric == "loss" else 0)
    return total


def unseen_share(counts: Tensor, probes: int) -> float:
    """The chance that the next lookup is of a row never seen: the share of rows seen once.

    Good, "The population frequencies of species", Biometrika 40 (1953).
    """
    once = int(((counts > 0) & (counts <= probes)).sum())
    return once * probes / max(float(counts.sum()), 1.0)


def noise_of(term: Term) -> tuple[float, float]:
    """The relative variance of both sides, as means of the samples' own moments.

    Of the inputs a sample says the same in every probe; of the gradients, something new.
    """
    variances = []
    for name, side in (("rows", term.rows), ("columns", term.columns)):
        assert side is not None
        square = float(squared(side).sum()) / term.pooled
        spread = max(term.squares / square - 1, 0.0) / term.pooled if square > 0 else 0.0
        of_inputs = name == ("columns" if term.contract == "columns" else "rows")
        variances.append(spread * term.probes if of_inputs else spread)
    return variances[0], variances[1]


def sample_moments(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Σ D Dᵀ (M, M), Σ Dᵀ D (N, N) and Σ ‖D Dᵀ‖² over samples, D = gᵀ x.

    g is (samples, T, M), x (samples, T, N), both real. No D is made where T is the smallest side:
    D Dᵀ = gᵀ (x xᵀ) g.
    """
    (_, time, rows), columns = g.shape, x.shape[-1]
    total_rows = torch.zeros(rows, rows, dtype=g.dtype)
    total_columns = torch.zeros(columns, columns, dtype=g.dtype)
    squares = 0.0
    direct = time > min(rows, columns)
    few = max(1, _ELEMENTS // (rows * columns if direct else time * time))
    for g_STM, x_STN in zip(g.split(few), x.split(few), strict=True):
        if direct:
            d_SMN = g_STM.mT @ x_STN
            own_rows = products(d_SMN.transpose(1, 2).flatten(0, 1))
            own_columns = products(d_SMN.flatten(0, 1))
            each = d_SMN @ d_SMN.mT if rows <= columns else d_SMN.mT @ d_SMN
            squares += float(each.square().sum(dtype=torch.float64))
        else:
            inner, outer = x_STN @ x_STN.mT, g_STM @ g_STM.mT
            own_rows = products(g_STM.flatten(0, 1), (inner @ g_STM).flatten(0, 1))
            own_columns = products(x_STN.flatten(0, 1), (outer @ x_STN).flatten(0, 1))
            both = inner @ outer  # tr(D Dᵀ D Dᵀ) = tr((x xᵀ) (g gᵀ) (x xᵀ) (g gᵀ))
            squares += float((both * both.mT).sum(dtype=torch.float64))
        total_rows += own_rows.cpu()
        total_columns += own_columns.cpu()
    return total_rows, total_columns, squares


def among(moment: Tensor | Products, rows: tuple[int, int], width: int) -> Tensor:
    """The moment of some rows of a weight as one of all of them."""
    first, end = rows
    moment = moment.matrix() if isinstance(moment, Products) else moment
    if moment.dim() == 1 or width > LARGEST_FULL_MOMENT:
        diagonal = moment if moment.dim() == 1 else moment.diagonal()
        return torch.nn.functional.pad(diagonal, (first, width - end))
    return torch.nn.functional.pad(moment, (first, width - end, first, width - end))


def conjugate(moment: Tensor | Products) -> Tensor | Products:
    """The moment of the rows' conjugates."""
    if isinstance(moment, Products):
        return Products(moment.x.conj())
    return moment.conj().resolve_conj()


def moment_of(rows: Tensor, width: int) -> Tensor | Products:
    """Σ x xᴴ over the rows: full (width, width), or its diagonal (width,).

    Of rows of several matrices (E, R, width) one for each.
    """
    if rows.dim() == 3:
        return (rows.mT @ rows.conj()).cpu()
    if width > LARGEST_FULL_MOMENT:
        return squared(widened(rows)).sum(0, dtype=torch.float64).cpu()
    return Products(widened(rows))


def products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Σ x yᴴ over the rows of x and y (x itself where there is none), in their precision."""
    x = widened(x)
    return x.t() @ (x if y is None else widened(y)).conj()


def widened(rows: Tensor) -> Tensor:
    """Half precision as float32: sums of products overflow in it, or lose their last digits."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
