"""What a format is asked: how it multiplies, which of its points are tried, what they cost.

A format is one file with a class of its own, and one line in ``registry``. What it leaves as it is
here it cannot do, or what follows from the rest does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.identities import with_identities, without_identities
from tensorize.algebra.metric import Metric, root_times, times_root
from tensorize.algebra.reconstruct import reconstruct
from tensorize.base.tensors import at_work, squared
from tensorize.formats import als
from tensorize.ir.machine import Machine
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec

_POINTS = 8
OTHER_COLORS = "#b8bec9", "#f6f7f9"

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class TensorTrain(Generic[S]):
    """A weight exactly, in one structure of a format; its roundings are the points that are tried.

    Of a tensor train for one split of its modes; block low rank, of which fewer components are
    again the best.
    """

    spec: S
    cores: tuple[Tensor, ...]


class Format(Generic[S]):
    """One family of factorizations. It has no state: what it is asked about is given."""

    name: str
    """What ``formats=`` calls it, and what its specs have as ``format``."""

    title: str
    """What it is called in sentences."""

    colors: tuple[str, str] = OTHER_COLORS
    """Stroke and fill in pictures; apart for colour-blind readers too."""

    unasked = False
    """Whether a weight may take it where nobody chose."""

    brings: tuple[str, ...] = ()
    """Formats that come with it, as it is a choice within them."""

    joins = False
    """Whether it is one choice for several weights of one input, made of trained weights."""

    spectral = False
    """Whether its best cores are U (…, M, r) and V (…, r, N) out of one singular value
    decomposition, which gives every rank at once: what each loses is a curve's own spectrum."""

    indexed = False
    """Whether its specs name the indices of its cores: then orders of contraction can be planned,
    spectra be taken of cores, and fresh ones be scaled."""

    planned = False
    """Whether the order in which x meets its cores is one of several, and is to be planned."""

    pair = False
    """Whether its cores are two matrices: then stacks of experts, convolutions, bags and slices of
    rows multiply with one and then with the other, and two linear layers can hold it."""

    kernels: str | None = None
    """The family of kernels: ``"pair"`` (two matrices), ``"chain"`` (a few small cores)."""

    # ------------------------------------------------------------------------ what it stands for

    def read(self, data: Mapping[str, Any]) -> S:
        """The spec that its ``to_dict`` wrote."""
        raise NotImplementedError(f"{self.name}: no specs")

    def reconstruct(self, spec: S, cores: Sequence[Tensor]) -> Tensor:
        """The dense weight of the cores, differentiably: the oracle of everything else.

        Raises:
            ValueError: number or shapes of the cores are not those of the spec.
        """
        raise NotImplementedError(f"{self.name}: no cores")

    def stored(
        self,
        spec: S,
        cores: Sequence[Tensor],
        dtype: torch.dtype,
        first: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """What is kept, in a dtype, of the cores that were computed, those of ``spec.plain``: with
        ``spec.indices`` after them.

        ``first``: what another weight keeps of a first factor that this one has in common with it.
        What it gives is of the spec that ``as_stored`` says.
        """
        assert not first, f"{self.name}: no first factor in common"
        return tuple(core.to(dtype) for core in cores)

    def as_stored(self, spec: S, cores: Sequence[Tensor]) -> S:
        """The spec of what ``stored`` gave: in which an order may keep fewer columns together."""
        return spec

    def computed(self, spec: S, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What ``stored`` was made of, up to a change of basis; differentiably."""
        return tuple(cores)

    def multiply(
        self, spec: S, cores: Sequence[Tensor], x: Tensor, contract: str, bias: Tensor | None
    ) -> Tensor:
        """x Wᵀ + bias (``contract="columns"``) or x W + bias, without a plan; by W rebuilt."""
        weight = self.reconstruct(spec, cores)
        return F.linear(x, weight if contract == "columns" else weight.t(), bias)

    def in_integers(self, spec: S, cores: Sequence[Tensor], x: Tensor, contract: str) -> bool:
        """Whether a product is one of integers: of weights of fewer bits, on some machines."""
        return False

    def width(self, cores: Sequence[Tensor]) -> int | None:
        """The entries of a row between the two products of ``multiply``; None where other work
        counts more than casting the cores."""
        return None

    def lookup(self, spec: S, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Rows of W by number: ``rows`` of any shape, the result (*rows.shape, N); W is rebuilt."""
        return F.embedding(rows, self.reconstruct(spec, cores))

    # ------------------------------------------------------------------- the points of a weight

    def fits(self, site: Site) -> bool:
        """Whether its cores can run every use of a weight."""
        return site.takes_trains

    def suggests(self, weight: Tensor) -> bool:
        """Whether a weight (M, N), of which nobody said what it may become, looks like this."""
        return False

    def exact(self, weight: Tensor, *, asked: bool) -> list[TensorTrain[S]]:
        """The structures that are tried for a weight (M, N), each exact.

        ``asked``: somebody chose the format; else it suggested itself.
        """
        return []

    def widest(self, m: int, n: int, *, apart: bool = False) -> list[S]:
        """The structures that are tried for a weight that has no values yet, at full ranks.

        ``apart``: its rows are to have entries of their own.
        """
        return []

    def rows_apart(self, spec: S) -> int | None:
        """The core that has entries of its own for every row of W; None where rows share all."""
        return None

    def clear_rows(self, spec: S, cores: Sequence[Tensor], rows: Tensor) -> None:
        """Let rows of W, by their numbers, be exactly zero, where ``rows_apart``: in place."""
        raise NotImplementedError(f"{self.name}: rows share entries")

    def largest_ranks(self, spec: S) -> tuple[int, ...]:
        """The ranks of a structure from which on it is exact."""
        return spec.ranks

    def ladder(self, spec: S, points: int = _POINTS) -> list[S]:
        """A structure at ranks growing geometrically from 1, as long as it is smaller than W."""
        largest = self.largest_ranks(spec)
        bounds = (max(1, round(max(largest) ** (step / points))) for step in range(points + 1))
        several = dict.fromkeys(tuple(min(bound, most) for most in largest) for bound in bounds)
        cuts: list[Any] = [spec.with_ranks(ranks) for ranks in several]
        return [cut for cut in cuts if self.least(cut) < math.prod(spec.shape)]

    def least(self, spec: S) -> int:
        """The fewest parameters that a spec can be stored in."""
        return spec.parameters

    def factors(
        self,
        spec: S,
        weight: Tensor,
        metrics: Sequence[Metric],
        exact: TensorTrain[S] | None = None,
    ) -> tuple[Tensor, ...]:
        """The cores of a spec for a dense weight, as good in the sum of the metrics as is known.

        ``exact``: the structure that it is a rounding of.
        """
        assert exact is not None
        rounded, cores = self.rounded(exact, spec.ranks)
        if all(metric.plain for metric in metrics):
            return tuple(cores)
        return self.improved(rounded, cores, at_work(weight), metrics)

    def rounded(self, exact: TensorTrain[S], ranks: Sequence[int]) -> tuple[S, Sequence[Tensor]]:
        """A structure at smaller ranks, near the best in the Frobenius norm."""
        raise NotImplementedError(f"{self.name}: no smaller ranks")

    def nearest(self, spec: S, weight: Tensor) -> list[Tensor]:
        """The cores of a spec for a fresh weight, near the best in the Frobenius norm."""
        exact = next(e for e in self.exact(weight, asked=True) if self.is_cut(spec, e.spec))
        return list(self.rounded(exact, spec.ranks)[1])

    def nested(self, shape: Sequence[int], metrics: int) -> bool:
        """Whether the best cores of a smaller rank are the first components of those of a larger
        one, of a weight (…, M, N) judged in so many metrics."""
        return False

    def is_cut(self, spec: S, structure: S) -> bool:
        """Whether a spec is a structure at other ranks."""
        if spec.format != structure.format or len(spec.ranks) != len(structure.ranks):
            return False
        return structure.with_ranks(spec.ranks) == spec

    def improved(
        self, spec: S, cores: Sequence[Tensor], weight: Tensor, metrics: Sequence[Metric]
    ) -> tuple[Tensor, ...]:
        """Cores of the same spec, closer to ``weight`` (M, N) in the sum of the metrics."""
        return als.improved(self, spec, cores, weight, metrics)

    def error(
        self, spec: S, cores: Sequence[Tensor], weight: Tensor, metrics: Sequence[Metric]
    ) -> float:
        """What the cores lose of ``weight``, in the sum of the metrics."""
        delta = self.reconstruct(spec, cores).sub_(weight)
        return sum(metric.norm(delta) for metric in metrics)

    def energy(self, spec: S, cores: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
        """Σ scale · ‖L_Rᵀ Ŵ L_K‖², differentiably."""
        weight = self.reconstruct(spec, cores)
        whitened = (times_root(root_times(m.left, weight), m.right) for m in metrics)
        squares = (m.scale * squared(w).sum() for m, w in zip(metrics, whitened, strict=True))
        return sum(squares, cores[0].real.new_zeros(()))

    def inner(self, spec: S, cores: Sequence[Tensor], other: Tensor) -> Tensor:
        """⟨other, Ŵ⟩, differentiably."""
        return (other.conj() * self.reconstruct(spec, cores)).sum().real

    # ----------------------------------------------------------------------------- what it costs

    def flops(self, spec: S, contract: str) -> Any:
        """FLOPs of one row where no order is planned: of a lookup, and of products without plan."""
        raise NotImplementedError(f"{self.name}: no FLOPs of {contract}")

    def time(self, spec: S, contract: str, rows: int, machine: Machine, dtype: str) -> Any:
        """Microseconds of so many rows on a machine, of the same."""
        raise NotImplementedError(f"{self.name}: no times of {contract}")


class Chain(Format[TTSpec]):
    """A format whose specs are ``TTSpec``."""

    indexed = True

    def read(self, data: Mapping[str, Any]) -> TTSpec:
        return TTSpec.from_dict(data)

    def reconstruct(self, spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
        return reconstruct(spec.plain, self.computed(spec, cores))

    def stored(
        self,
        spec: TTSpec,
        cores: Sequence[Tensor],
        dtype: torch.dtype,
        first: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        if not spec.pivoted:
            return super().stored(spec, cores, dtype, first)
        assert not first, f"{self.name}: no first factor in common"
        return without_identities(spec, cores, dtype)

    def computed(self, spec: TTSpec, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return with_identities(spec, cores) if spec.pivoted else tuple(cores)

    def least(self, spec: TTSpec) -> int:
        return spec.parameters - (0 if spec.pivoted else spec.removable)

    def rows_apart(self, spec: TTSpec) -> int | None:
        holds = (k for k, axes in enumerate(spec.cores) if {*spec.rows} <= {*axes})
        return next((k for k in holds if k == 0 or not spec.pivoted), None)

    def clear_rows(self, spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> None:
        k = self.rows_apart(spec)
        assert k is not None
        axes = [spec.cores[k].index(name) for name in spec.rows]
        digits = torch.unravel_index(rows, [spec.size[name] for name in spec.rows])
        cores[k].movedim(axes, list(range(len(axes))))[digits] = 0
