"""The data that every stage speaks: factor specs, sites, plans. All of it is frozen and hashable.

Shape suffixes used in this project: B batch rows, M rows and N columns of a weight, R rank,
E experts (a leading batch of matrices).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy

from tensorize import printer
from tensorize.errors import AnalysisError

DENSE, LOW_RANK, TT, BLOCK = "dense", "low_rank", "tt", "block"
SHARED = "shared"
"""What ``formats`` calls low rank where weights of one input have their first factor in common."""
FORMATS = (DENSE, LOW_RANK, SHARED, TT, BLOCK)
NONLINEARITIES = ("silu", "gelu", "relu", "tanh")
"""What there can be between two factors: functions of ``torch.nn.functional``."""
REFIT, POLISH = "refit", "polish"
"""What is done to the cores after the decompositions; a polish comes after a refit."""


@dataclass(frozen=True, init=False, repr=False)
class TTSpec:
    """A factorization of a matrix as cores with named indices.

    ``TTSpec(row_modes, column_modes, ranks)`` is the tensor-train family (Oseledets 2011; in
    matrix form also called MPO): core k has shape (ranks[k-1], row_modes[k], column_modes[k],
    ranks[k]); the two outer ranks are 1 and are left out, so ``ranks`` has one entry less than
    there are cores. Low rank is the two-core case ``[m | n]``; ``TTSpec.block`` makes blocks.

    The weight's row index is the tuple of all row modes, major first, and so is the column index.
    Axes of size 1 (outer ranks, absent modes) are not stored: ``core_shapes`` is what the tensors
    really have, ``cores`` the names of their axes, ``size`` the size of each by name. ``shape`` is
    that of the weight, (m, n) or (experts, m, n); ``format`` is ``"low_rank"`` for ``[m | n]``,
    ``"block"`` where two cores share a row or a column index, and ``"tt"`` for every other chain;
    ``single`` is the spec of one expert.

    Args:
        row_modes: factors of the number of rows, one a core (1 where a core has none).
        column_modes: factors of the number of columns, one a core.
        ranks: the inner ranks.
        experts: how many matrices of this form are stacked in front (0: one plain matrix).

    Raises:
        ValueError: lengths do not fit, or an entry is not a positive integer.
    """

    cores: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    batch: tuple[str, ...]

    if TYPE_CHECKING:
        size: Mapping[str, int] = field(init=False, compare=False)
        shape: tuple[int, ...] = field(init=False, compare=False)
        format: str = field(init=False, compare=False)
        core_shapes: tuple[tuple[int, ...], ...] = field(init=False, compare=False)
        row_modes: tuple[int, ...] = field(init=False, compare=False)
        column_modes: tuple[int, ...] = field(init=False, compare=False)
        ranks: tuple[int, ...] = field(init=False, compare=False)
        single: TTSpec = field(init=False, compare=False)

    def __init__(
        self,
        row_modes: Sequence[int],
        column_modes: Sequence[int],
        ranks: Sequence[int],
        *,
        experts: int = 0,
    ) -> None:
        row_modes, column_modes, ranks = tuple(row_modes), tuple(column_modes), tuple(ranks)
        count = len(row_modes)
        if count == 0 or len(column_modes) != count or len(ranks) != count - 1:
            raise ValueError(
                f"a chain of d cores needs d row modes, d column modes and d-1 ranks, got "
                f"{row_modes}, {column_modes}, {ranks}"
            )
        for value in (*row_modes, *column_modes, *ranks):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"modes and ranks are positive integers, got {value!r}")
        sizes: dict[str, int] = {"e": experts} if experts else {}
        batch: tuple[str, ...] = ("e",) if experts else ()
        # One row and one column axis always stay, so that a 1 x n matrix is still a matrix.
        keep_row = {k for k, mode in enumerate(row_modes) if mode > 1} or {0}
        keep_column = {k for k, mode in enumerate(column_modes) if mode > 1} or {count - 1}
        cores: list[tuple[str, ...]] = []
        for k in range(count):
            axes: list[str] = list(batch)
            if k > 0:
                sizes[f"r{k}"] = ranks[k - 1]
                axes.append(f"r{k}")
            if k in keep_row:
                sizes[f"m{k}"] = row_modes[k]
                axes.append(f"m{k}")
            if k in keep_column:
                sizes[f"n{k}"] = column_modes[k]
                axes.append(f"n{k}")
            if k < count - 1:
                sizes[f"r{k + 1}"] = ranks[k]
                axes.append(f"r{k + 1}")
            cores.append(tuple(axes))
        self._set(
            tuple(cores),
            tuple(sizes.items()),
            tuple(f"m{k}" for k in sorted(keep_row)),
            tuple(f"n{k}" for k in sorted(keep_column)),
            batch,
            (row_modes, column_modes, ranks),
        )

    def _set(self, cores, sizes, rows, columns, batch, modes) -> None:  # type: ignore[no-untyped-def]
        for name, value in zip(
            ("cores", "sizes", "rows", "columns", "batch", "row_modes", "column_modes", "ranks"),
            (cores, sizes, rows, columns, batch, *modes),
            strict=True,
        ):
            object.__setattr__(self, name, value)
        # Derived once, as plain attributes: they are read at every call of a rewritten module, and
        # by dynamo, which traces plain attributes best.
        size = dict(sizes)
        lead = tuple(size[name] for name in batch)
        m, n = (math.prod(size[name] for name in names) for names in (rows, columns))
        sides = {*rows, *columns}
        split = len(cores) == 2 and not (set(cores[0]) & set(columns) or set(cores[1]) & set(rows))
        shared = any(sides.intersection(*pair) for pair in pairwise(cores))
        for name, value in (
            ("size", size),
            ("shape", (*lead, m, n)),
            ("format", LOW_RANK if split else BLOCK if shared else TT),
            ("core_shapes", tuple(tuple(size[name] for name in core) for core in cores)),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "single", self._like(self.ranks) if batch else self)

    @classmethod
    def low_rank(cls, m: int, n: int, r: int, *, experts: int = 0) -> TTSpec:
        """The two-core case ``[m | n]``: W = U V with U of (m, r) and V of (r, n)."""
        return cls((m, 1), (1, n), (r,), experts=experts)

    @classmethod
    def block(
        cls, row_modes: Sequence[int], column_modes: Sequence[int], rank: int, *, experts: int = 0
    ) -> TTSpec:
        """Block low rank: each of m1 x n0 blocks of m0 x n1 entries has a rank of its own.

        With the row index (m0, m1) and the column index (n0, n1), block (m1, n0) holds the rows
        and columns in which these two stand still, W = Σ_r left[m1, m0, n0, r] right[n0, m1, r, n1]
        (block tensor train, Qiu et al. 2024; Monarch, Dao et al. 2022, is rank 1). The right core
        meets x first, as one matrix for every n0, the left core gives y, as one for every m1: one
        row costs twice as many FLOPs as there are parameters. With a single block it is low rank.

        Args:
            row_modes: (m0, m1), factors of the number of rows.
            column_modes: (n0, n1), factors of the number of columns.
            rank: of every block.
            experts: how many matrices of this form are stacked in front (0: one plain matrix).

        Raises:
            ValueError: these are not two modes a side, or an entry is not a positive integer.
        """
        row_modes, column_modes = tuple(row_modes), tuple(column_modes)
        if len(row_modes) != 2 or len(column_modes) != 2:
            raise ValueError(
                f"block low rank has two row modes and two column modes, got {row_modes}, "
                f"{column_modes}"
            )
        TTSpec(row_modes, column_modes, (rank,))  # checks the entries
        size = dict(zip(("m0", "m1", "n0", "n1"), (*row_modes, *column_modes), strict=True))
        size = {"e": experts, **size, "r1": rank}
        # One row and one column axis always stay, as in a chain: a single block is low rank.
        kept = {"m0": row_modes[1] == 1, "n1": column_modes[0] == 1, "r1": True, "e": experts > 0}
        present = {name for name in size if size[name] > 1 or kept.get(name)}

        def axes(*names: str) -> tuple[str, ...]:
            return tuple(name for name in names if name in present)

        spec = cls.__new__(cls)
        spec._set(
            (axes("e", "m1", "m0", "n0", "r1"), axes("e", "n0", "m1", "r1", "n1")),
            tuple((name, size[name]) for name in axes("e", "m0", "m1", "n0", "r1", "n1")),
            axes("m0", "m1"),
            axes("n0", "n1"),
            axes("e"),
            (row_modes, column_modes, (rank,)),
        )
        return spec

    @property
    def parameters(self) -> int:
        """Number of elements of all cores together."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    def with_ranks(self, ranks: Sequence[int]) -> TTSpec:
        """The same modes with other inner ranks."""
        return self._like(ranks, experts=self.size["e"] if self.batch else 0)

    def _like(self, ranks: Sequence[int], experts: int = 0) -> TTSpec:
        if self.format == BLOCK:
            (rank,) = ranks
            return TTSpec.block(self.row_modes, self.column_modes, rank, experts=experts)
        return TTSpec(self.row_modes, self.column_modes, ranks, experts=experts)

    def to_dict(self) -> dict[str, Any]:
        experts = self.size["e"] if self.batch else 0
        return {
            "row_modes": list(self.row_modes),
            "column_modes": list(self.column_modes),
            "ranks": list(self.ranks),
            "experts": experts,
            **({"format": BLOCK} if self.format == BLOCK else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TTSpec:
        rows, columns, ranks = data["row_modes"], data["column_modes"], data["ranks"]
        experts = data.get("experts", 0)
        if data.get("format") == BLOCK:
            (rank,) = ranks
            return cls.block(rows, columns, rank, experts=experts)
        return cls(rows, columns, ranks, experts=experts)

    def __repr__(self) -> str:
        experts = f", experts={self.size['e']}" if self.batch else ""
        if self.format == BLOCK:
            rank = self.ranks[0]
            return f"TTSpec.block({self.row_modes}, {self.column_modes}, {rank}{experts})"
        return f"TTSpec({self.row_modes}, {self.column_modes}, {self.ranks}{experts})"


# ---------------------------------------------------------------------------------- machines


@dataclass(frozen=True)
class Machine:
    """What matmuls cost on a machine: FLOP/s, bytes/s, and the seconds of a call.

    ``rates`` are pairs of a dtype and its FLOP/s at each of ``rows`` input rows. Ranks that are
    multiples of ``rank_multiple`` suit its matrix units.
    """

    name: str
    rows: tuple[int, ...]
    rates: tuple[tuple[str, tuple[float, ...]], ...]
    bandwidth: float
    launch: float
    rank_multiple: int = 1

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.bandwidth / 1e9:.3g} GB/s, {1e6 * self.launch:.3g} µs a call"]
        for dtype, rates in self.rates:
            known = zip(self.rows, rates, strict=True)
            each = ", ".join(f"{rate / 1e9:.4g} at {rows}" for rows, rate in known)
            lines.append(f"{dtype}: GFLOP/s at so many rows: {each}")
        return "\n".join(lines)


GENERIC = Machine(
    "one core of a usual processor",
    (1, 16, 256),
    (("float32", (1.5e10, 3e10, 6e10)), ("bfloat16", (2e10, 6e10, 2e11))),
    bandwidth=2e10,
    launch=3e-6,
)

# ---------------------------------------------------------------------------- contraction orders

Tree = int | str | tuple["Tree", "Tree"]
"""A contraction tree: ``"x"`` is the input, an integer k is core k, a pair is a contraction."""


@dataclass(frozen=True)
class ContractionPiece:
    """One contraction tree and the batches for which it is the cheapest.

    Its cost is ``constant + slope * B`` FLOPs and its largest intermediate has
    ``peak_constant`` or ``peak_slope * B`` elements, whichever is more. ``layout`` is which of the
    emitter's ways to lay out what lies between runs: the one of least predicted time, or another
    that was timed.
    """

    tree: Tree
    first_batch: int
    last_batch: int | None
    constant: int
    slope: int
    peak_constant: int
    peak_slope: int
    layout: int = 0

    def flops(self, batch: int) -> int:
        return self.constant + self.slope * batch


def typical_batch(first_batch: int, last_batch: int | None) -> int:
    """What stands for a range of batches, where one number must; far ones do not count."""
    far = 64 * first_batch
    return round((first_batch * min(last_batch or far, far)) ** 0.5)


@dataclass(frozen=True)
class ContractionPlan:
    """The cheapest contraction order for every batch: the lower envelope of lines in B.

    ``contract`` says which side of the weight meets the input: ``"columns"`` for y = x Wᵀ (a
    linear layer), ``"rows"`` for y = x W. FLOPs are counted as opt_einsum does: the product of all
    index sizes of a pairwise contraction, twice when an index is summed.
    """

    spec: TTSpec
    contract: str
    pieces: tuple[ContractionPiece, ...]

    def piece(self, batch: int) -> ContractionPiece:
        """The piece that is used for ``batch`` rows (at least 1)."""
        for piece in self.pieces:
            if piece.last_batch is None or batch <= piece.last_batch:
                return piece
        raise AssertionError("the last piece of a contraction plan has no end")

    def flops(self, batch: int) -> int:
        """FLOPs of the cheapest order for ``batch`` rows."""
        return self.piece(batch).flops(batch)

    def peak_elements(self, batch: int) -> int:
        """Elements of the largest intermediate or output of that order."""
        piece = self.piece(batch)
        return max(piece.peak_constant, piece.peak_slope * batch)

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """The first batch of every piece but the first."""
        return tuple(piece.first_batch for piece in self.pieces[1:])

    @cached_property
    def expression(self) -> sympy.Expr:
        """FLOPs as a sympy expression in the batch symbol ``B``."""
        batch = sympy.Symbol("B", positive=True, integer=True)
        lines = [sympy.Integer(p.constant) + p.slope * batch for p in self.pieces]
        conditions = [
            batch <= p.last_batch if p.last_batch is not None else sympy.true for p in self.pieces
        ]
        return sympy.Piecewise(*zip(lines, conditions, strict=True))

    def __str__(self) -> str:
        lines = [f"contraction of {self.spec} with its {self.contract}"]
        lines.append(f"{'batch':>16}  {'FLOPs':>28}  {'peak elements':>22}  order")
        for p in self.pieces:
            end = "…" if p.last_batch is None else str(p.last_batch)
            flops = f"{p.constant} + {p.slope} B"
            peak = f"max({p.peak_constant}, {p.peak_slope} B)"
            span = f"{p.first_batch}–{end}"
            lines.append(f"{span:>16}  {flops:>28}  {peak:>22}  {p.tree}")
        return "\n".join(lines)


# --------------------------------------------------------------------------------- training plans


@dataclass(frozen=True)
class TrainingStep:
    """A value with a name: the output ``"y"``, a gradient, or one that is used more than once.

    ``tree`` gives it, from the input ``"x"``, the output's gradient ``"g"``, cores by number, and
    values with a name; ``axes`` are its indices. Gradients are ``"dx"``, ``"d0"``, ``"d1"``, ….
    """

    name: str
    tree: Tree
    axes: tuple[str, ...]


@dataclass(frozen=True)
class TrainingPiece:
    """How a contraction and its gradients are computed for some batches.

    ``forward`` ends with ``"y"``, ``backward`` with the gradients; ``saved`` are the values that
    the backward pass takes from the forward pass, the input among them (``"x"``) where it needs it.
    What stands in both is computed twice. Both passes cost ``constant + slope * B`` FLOPs,
    ``saved`` has ``saved_constant + saved_slope * B`` elements.
    """

    forward: tuple[TrainingStep, ...]
    backward: tuple[TrainingStep, ...]
    saved: tuple[str, ...]
    first_batch: int
    last_batch: int | None
    constant: int
    slope: int
    saved_constant: int
    saved_slope: int


@dataclass(frozen=True)
class TrainingPlan:
    """Orders for a contraction and its gradients, chosen together, for every batch.

    ``gradients`` are the operands that get one: ``"x"`` and cores by number. FLOPs are counted as
    in a ``ContractionPlan``. The input counts as saved where the backward pass needs it; cores are
    parameters and do not.
    """

    spec: TTSpec
    contract: str
    gradients: tuple[int | str, ...]
    pieces: tuple[TrainingPiece, ...]

    def piece(self, batch: int) -> TrainingPiece:
        """The piece that is used for ``batch`` rows (at least 1)."""
        return next(p for p in self.pieces if p.last_batch is None or batch <= p.last_batch)

    def flops(self, batch: int) -> int:
        """FLOPs of the forward and the backward pass together."""
        piece = self.piece(batch)
        return piece.constant + piece.slope * batch

    def saved_elements(self, batch: int) -> int:
        """Elements that the forward pass leaves for the backward pass."""
        piece = self.piece(batch)
        return piece.saved_constant + piece.saved_slope * batch

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """The first batch of every piece but the first."""
        return tuple(piece.first_batch for piece in self.pieces[1:])

    def __str__(self) -> str:
        names = ", ".join("x" if g == "x" else f"core {g}" for g in self.gradients)
        lines = [f"training of {self.spec} with its {self.contract}: gradients of {names}"]
        for p in self.pieces:
            end = "…" if p.last_batch is None else str(p.last_batch)
            lines.append(
                f"batch {p.first_batch}–{end}: {p.constant} + {p.slope} B FLOPs, "
                f"{p.saved_constant} + {p.saved_slope} B elements saved ({', '.join(p.saved)})"
            )
            for title, steps in (("forward", p.forward), ("backward", p.backward)):
                lines += [f"  {title:>8}  {step.name} = {step.tree}" for step in steps]
        return "\n".join(lines)


# -------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Use:
    """One way in which the model uses a weight.

    ``contract``: ``"columns"`` (y = x Wᵀ), ``"rows"`` (y = x W), ``"lookup"`` (rows of W) or
    ``"whole"`` (a function of W itself: factorized, W is rebuilt at every call).
    ``rows`` is the number of input rows of one forward pass of the example inputs (0: unknown).
    ``split``: how many leading axes of the weight make up its rows; 0: its last two axes are the
    matrix. ``groups`` of a convolution. ``partial``: it uses some of the weight's rows.
    """

    kind: str
    contract: str
    rows: int = 0
    split: int = 0
    groups: int = 1
    partial: bool = False


@dataclass(frozen=True)
class Site:
    """One parameter and every matmul-like use of it; a tied weight has several names and uses.

    ``shape`` is the parameter's own: (m, n), a stack (experts, m, n), or any other whose leading
    axes make up the rows (a convolution's (m, in, *kernel), a projection of several heads).
    ``blocked`` is the reason why it cannot be factorized, ``None`` where it can; ``last_resort``
    the reason why it is only where the budget cannot be met otherwise. ``input_group`` is the name
    of the first of several linears that read the same input (q, k, v; gate, up).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    aliases: tuple[str, ...] = ()
    blocked: str | None = None
    last_resort: str | None = None
    input_group: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def kind(self) -> str:
        """The kinds of its uses, such as ``"linear"`` or ``"embedding+linear"``."""
        return "+".join(dict.fromkeys(use.kind for use in self.uses)) or "unknown"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def split(self) -> int:
        """How many leading axes make up the rows; 0: the last two axes are the matrix."""
        return self.uses[0].split if self.uses else 0

    @property
    def groups(self) -> int:
        """The groups of a convolution: as many matrices."""
        return self.uses[0].groups if self.uses else 1

    @property
    def experts(self) -> int:
        """How many matrices the weight stacks; 0: it is one."""
        if self.groups > 1:
            return self.groups
        return self.shape[0] if len(self.shape) == 3 and not self.split else 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight, of one of them where there are several."""
        if not self.split:
            return self.shape[-2], self.shape[-1]
        rows, columns = math.prod(self.shape[: self.split]), math.prod(self.shape[self.split :])
        return rows // self.groups, columns

    @property
    def takes_trains(self) -> bool:
        """Whether a tensor train can run every use of it; low rank always can."""
        only_low_rank = ("conv", "embedding_bag", "grouped_mm")
        plain = not self.experts and not self.last_resort
        plain = plain and not any(use.partial for use in self.uses)
        return plain and not any(use.kind.startswith(only_low_rank) for use in self.uses)


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model: its arguments, and what the caller gave (a ``loss_fn`` gets that).

    ``names`` are those of the positional arguments, where they are known; ``number`` is its place
    among the batches that the caller gave.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Any
    names: tuple[str, ...] = ()
    number: int = 0

    def argument(self, name: str) -> Any:
        """What forward gets by a name; None where it is not passed."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}.get(name)


# --------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class RankPlan:
    """What is done with one site, and why.

    ``predicted_error`` is the relative error of the weight in the metric of the analysis,
    ``predicted_loss`` its share of the predicted rise of the loss (0.0 without a ``loss`` metric).
    ``shared`` names the first of the weights that have their first factor (that of the input) in
    common; that one is counted with it, the others are not.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: TTSpec | None
    predicted_error: float
    predicted_loss: float
    reason: str
    shared: str | None = None

    @property
    def format(self) -> str:
        return DENSE if self.spec is None else self.spec.format

    @property
    def ranks(self) -> tuple[int, ...]:
        return () if self.spec is None else self.spec.ranks

    @property
    def parameters_before(self) -> int:
        return math.prod(self.shape)

    @property
    def parameters_after(self) -> int:
        if self.spec is None:
            return self.parameters_before
        if self.shared not in (None, self.name):
            return math.prod(self.spec.core_shapes[0])
        return self.spec.parameters

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["shape"] = list(self.shape)
        data["spec"] = None if self.spec is None else self.spec.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RankPlan:
        spec = None if data["spec"] is None else TTSpec.from_dict(data["spec"])
        return cls(**{**data, "shape": tuple(data["shape"]), "spec": spec})


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to give.

    ``loss`` is the rise of the loss to preserve on unseen data (nats for a model with logits,
    squared error relative to the outputs' variance otherwise), ``loss_interval`` its 90 % interval;
    both are ``None`` where the analysis saw no data. ``output_error`` is the largest relative
    error of a site's weight in the metric where there are no data, and the relative error of the
    outputs (a norm) where there are. ``flops`` are per input row of a site, the worst over
    ``batch_sizes``; ``latency`` is the time of all matmuls against the model's parameters, in
    microseconds, for each of those numbers of rows.
    """

    parameters: int
    bytes: int
    flops: int
    output_error: float
    loss: float | None = None
    loss_interval: tuple[float, float] | None = None
    latency: tuple[float, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Size and cost of a whole model; each parameter counts once, ``flops`` are per input row.

    ``latency``: microseconds of its matmuls, for each of a plan's ``batch_sizes``.
    """

    parameters: int
    bytes: int
    flops: int
    latency: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One choice of formats and ranks for a whole model: hashable, printable, kept as JSON.

    ``fingerprint`` identifies the model and analysis that it was made for; ``refine`` is what will
    be done to the cores, and what ``predicted`` is of; ``gap`` the share of the sum of distortions
    by which a better choice might be better (the duality gap); ``machine`` the one whose figures
    its times are predicted from; ``own_loss`` says that its loss is a ``loss_fn`` of the caller's,
    ``limits_errors`` that its budget limits the error of every weight.
    A plan that comes from ``Analysis.plan`` also carries that analysis; it is no part of equality,
    hash or JSON.
    """

    sites: tuple[RankPlan, ...]
    budget: str
    metric: str
    predicted: Prediction
    dense: Totals
    batch_sizes: tuple[int, ...]
    seed: int
    fingerprint: str
    refine: str | None = None
    gap: float = 0.0
    machine: str = GENERIC.name
    notes: tuple[str, ...] = ()
    cache: str | None = None
    own_loss: bool = False
    limits_errors: bool = False
    analysis: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        after, before = self.predicted, self.dense
        refined = f", refined by a {self.refine}" if self.refine else ""
        lines = [
            f"plan for {self.budget} in the {self.metric} metric{refined}",
            f"parameters {printer.count(before.parameters)} to {printer.count(after.parameters)}, "
            f"FLOPs a row {printer.count(before.flops)} to {printer.count(after.flops)}, "
            f"error {printer.number(after.output_error)}",
        ]
        if after.loss is not None:
            span = printer.interval(after.loss_interval)
            lines[-1] += f", loss {printer.number(after.loss)} (90 %: {span})"
        rows = [
            (
                site.name,
                site.kind,
                printer.shape_text(site.shape),
                printer.format_text(site.format, site.ranks),
                printer.count(site.parameters_after),
                printer.number(site.predicted_error),
                site.reason,
            )
            for site in self.sites
        ]
        headers = ("weight", "kind", "shape", "format", "parameters", "error", "why")
        align: list[printer.Align] = ["left", "left", "keep", "keep", "right", "right", "wrap"]
        return "\n".join([*lines, "", printer.table(headers, rows, align=align)])

    def to_json(self) -> str:
        """Everything but the analysis that it carries; ``from_json`` reads it."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "analysis"}
        data["sites"] = [site.to_dict() for site in self.sites]
        data["predicted"] = {f.name: getattr(self.predicted, f.name) for f in fields(Prediction)}
        data["dense"] = {f.name: getattr(self.dense, f.name) for f in fields(Totals)}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            AnalysisError: the text is none.
        """
        try:
            data = json.loads(text)
            predicted, dense = data["predicted"], data["dense"]
        except (ValueError, TypeError, KeyError) as error:
            raise AnalysisError(
                "the text is no plan", way_out="what plan.to_json() wrote"
            ) from error
        if predicted["loss_interval"] is not None:
            predicted["loss_interval"] = tuple(predicted["loss_interval"])
        for figures in (predicted, dense):
            figures["latency"] = tuple(figures.get("latency", ()))
        return cls(
            **{
                **data,
                "sites": tuple(RankPlan.from_dict(site) for site in data["sites"]),
                "predicted": Prediction(**predicted),
                "dense": Totals(**dense),
                "batch_sizes": tuple(data["batch_sizes"]),
                "notes": tuple(data["notes"]),
            }
        )
