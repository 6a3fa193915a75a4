"""The data that every stage speaks: factor specs, sites, plans. All of it is frozen and hashable.

Shape suffixes used in this project: B batch rows, M rows and N columns of a weight, R rank,
E experts (a leading batch of matrices).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from tensorize.ir.precision import ITEMSIZE

DENSE, LOW_RANK, TT, BLOCK = "dense", "low_rank", "tt", "block"
SHARED = "shared"
"""What ``formats`` calls low rank where weights of one input have their first factor in common."""
NONLINEARITIES = ("silu", "gelu", "relu", "tanh")
"""What there can be between two factors: functions of ``torch.nn.functional``."""

MOST_ELEMENTS = 2**56
"""Of a tensor whose shape a file tells: sizes of their bytes are still numbers of 63 bits."""


@dataclass(frozen=True)
class Index:
    """Integers that come after the cores: what they are called, their shape, and their dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Spec:
    """How one weight is factorized, whatever its format: frozen, hashable, kept as JSON.

    ``shape`` is that of the weight, (m, n) or (experts, m, n), ``core_shapes`` what the tensors
    have; ``ranks`` are the sizes that can be chosen smaller. ``batch`` is empty but for a stack of
    experts, of which ``single`` is one. ``storage`` is the dtype that the entries are kept in, by
    its name (None: the weight's own). ``indices`` are tensors of integers that come after the
    cores, which are no parameters: the columns that these are of, or codes. ``precision`` is what
    the entries are rounded to, by its name (None: they are not).
    """

    format: str
    shape: tuple[int, ...]
    core_shapes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    batch: tuple[str, ...] = ()
    storage: str | None = None
    indices: tuple[Index, ...] = ()
    pivoted: int = 0
    precision: str | None = None
    single: Any

    @property
    def plain(self) -> Any:
        """What the cores are computed as: with an identity that is not stored, and not rounded."""
        return self

    def bytes(self, itemsize: int, holders: int = 1) -> Any:
        """What is held for a weight whose own entries have ``itemsize``, by so many modules.

        Tied modules have the cores in common, and indices of their own.
        """
        own = itemsize if self.storage is None else ITEMSIZE[self.storage]
        return self.parameters * own + holders * sum(index.bytes for index in self.indices)

    def packed_bytes(self, contracts: Collection[str]) -> int:
        """What a CPU holds beside that, once the weight has run in all of its uses."""
        return 0

    @property
    def parameters(self) -> int:
        """Number of elements of all cores together."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    def with_ranks(self, ranks: Sequence[int]) -> Self:
        """The same with other ranks."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, ``"format"`` among it; ``from_dict`` reads it."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The spec that ``to_dict`` wrote, of whatever format."""
        if data.get("precision") is not None or data.get("format") == DENSE:
            from tensorize.ir import coded  # which is of what is defined here

            return coded.from_dict(data)
        return READERS.get(data.get("format", ""), TTSpec.from_dict)(data)


READERS: dict[str, Callable[[Mapping[str, Any]], Spec]] = {}
"""What reads the specs of a format that is no ``TTSpec``, by its name: ``formats`` fills it."""


@dataclass(frozen=True, init=False, repr=False)
class TTSpec(Spec):
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
    ``single`` is the spec of one expert. ``pivoted`` low rank does not store the r columns in which
    V is the identity: U (m, r), V' (r, n - r), and the order of the columns. That moves so many
    neighbours at a time: of ``pivoted`` 1 it is (n,), of 4 it is (n / 4,), and of n it moves none.
    Of a ``pivoted`` train or block every core but the first is a matrix, or one for each block,
    whose rows are its bond, without the columns that are an identity; these are in ``kept_k``.

    Args:
        row_modes: factors of the number of rows, one a core (1 where a core has none).
        column_modes: factors of the number of columns, one a core.
        ranks: the inner ranks.
        experts: how many matrices of this form are stacked in front (0: one plain matrix).
        storage: the dtype that the entries are kept in, by its name (None: the weight's own).

    Raises:
        ValueError: lengths do not fit, or an entry is not a positive integer.

    Examples:
        >>> tensorize.TTSpec.low_rank(64, 32, 4).parameters
        384
        >>> tensorize.TTSpec((8, 8), (4, 8), (5,)).core_shapes
        ((8, 4, 5), (5, 8, 8))
    """

    cores: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    batch: tuple[str, ...]
    storage: str | None = field(default=None, hash=False)
    pivoted: int = field(default=0, hash=False)

    if TYPE_CHECKING:
        size: Mapping[str, int] = field(init=False, compare=False)
        shape: tuple[int, ...] = field(init=False, compare=False)
        format: str = field(init=False, compare=False)
        core_shapes: tuple[tuple[int, ...], ...] = field(init=False, compare=False)
        whole_shapes: tuple[tuple[int, ...], ...] = field(init=False, compare=False)
        indices: tuple[Index, ...] = field(init=False, compare=False)
        row_modes: tuple[int, ...] = field(init=False, compare=False)
        column_modes: tuple[int, ...] = field(init=False, compare=False)
        ranks: tuple[int, ...] = field(init=False, compare=False)
        single: TTSpec = field(init=False, compare=False)
        _plain: TTSpec = field(init=False, compare=False)

    def __init__(
        self,
        row_modes: Sequence[int],
        column_modes: Sequence[int],
        ranks: Sequence[int],
        *,
        experts: int = 0,
        storage: str | None = None,
    ) -> None:
        row_modes, column_modes, ranks = tuple(row_modes), tuple(column_modes), tuple(ranks)
        count = len(row_modes)
        if count == 0 or len(column_modes) != count or len(ranks) != count - 1:
            raise ValueError(
                f"a chain of d cores needs d row modes, d column modes and d-1 ranks, got "
                f"{row_modes}, {column_modes}, {ranks}"
            )
        for value in (*row_modes, *column_modes, *ranks, experts or 1):
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
            storage,
        )

    def _set(  # type: ignore[no-untyped-def]
        self, cores, sizes, rows, columns, batch, modes, storage, pivoted=0
    ) -> None:
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
        shapes = tuple(tuple(size[name] for name in core) for core in cores)
        whole, indices = shapes, ()
        if pivoted:
            ends = [core.index(f"r{k}") + 1 for k, core in enumerate(cores) if k]
            flat = [(*s[:e], math.prod(s[e:])) for s, e in zip(shapes[1:], ends, strict=True)]
            shapes = shapes[0], *((*before, r, width - r) for *before, r, width in flat)
            indices = tuple(Index(f"kept_{k}", s[:-1], "int32") for k, s in enumerate(flat, 1))
            if split:  # whose input is put in an order, all of it
                indices = (Index("order", (*lead, n // pivoted), "int32"),)
        for name, value in (
            ("storage", storage),
            ("pivoted", pivoted),
            ("size", size),
            ("shape", (*lead, m, n)),
            ("format", LOW_RANK if split else BLOCK if shared else TT),
            ("core_shapes", shapes),
            ("whole_shapes", whole),
            ("indices", indices),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "single", self._like(self.ranks) if batch else self)
        object.__setattr__(self, "_plain", self._stored_as(0) if pivoted else self)

    @classmethod
    def low_rank(
        cls,
        m: int,
        n: int,
        r: int,
        *,
        experts: int = 0,
        storage: str | None = None,
        pivoted: int = 0,
    ) -> TTSpec:
        """The two-core case ``[m | n]``: W = U V with U of (m, r) and V of (r, n).

        ``pivoted``: V is the identity in r of its columns, which are not stored (r <= n); the order
        of the columns keeps so many neighbours together.

        Raises:
            ValueError: an entry is not a positive integer, a pivoted rank is above n, or n is no
                multiple of the neighbours.
        """
        spec = cls((m, 1), (1, n), (r,), experts=experts, storage=storage)
        if not pivoted:
            return spec
        return spec.in_order_of(pivoted)

    @classmethod
    def block(
        cls,
        row_modes: Sequence[int],
        column_modes: Sequence[int],
        rank: int,
        *,
        experts: int = 0,
        storage: str | None = None,
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
            experts, storage: as for a chain.

        Raises:
            ValueError: these are not two modes a side, or an entry is not a positive integer.
        """
        row_modes, column_modes = tuple(row_modes), tuple(column_modes)
        if len(row_modes) != 2 or len(column_modes) != 2:
            raise ValueError(
                f"block low rank has two row modes and two column modes, got {row_modes}, "
                f"{column_modes}"
            )
        TTSpec(row_modes, column_modes, (rank,), experts=experts)  # checks the entries
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
            storage,
        )
        return spec

    @property
    def is_block(self) -> bool:
        """Whether two cores share a row or a column index, and it is no chain."""
        return self.format == BLOCK

    def with_ranks(self, ranks: Sequence[int]) -> TTSpec:
        """The same modes with other inner ranks; an order of columns is then any."""
        spec = self if self.pivoted <= 1 else self.in_order_of(1)
        return spec._like(ranks, experts=self.size["e"] if self.batch else 0)

    def in_order_of(self, neighbours: int) -> TTSpec:
        """The same without identities; of low rank an order keeps so many columns together.

        Raises:
            ValueError: a rank is larger than the other side of the core behind it, or there are no
                such groups of columns.
        """
        n = self.shape[-1]
        for rank, width in zip(self.ranks, self.widths, strict=True):
            if rank > width:
                raise ValueError(f"{self.plain} has no identity in {rank} of {width} columns")
        if neighbours < 1 or n % neighbours or (neighbours > 1 and self.format != LOW_RANK):
            raise ValueError(f"{n} columns are no groups of {neighbours}")
        return self._stored_as(int(neighbours))

    @property
    def removable(self) -> int:
        """How many of its numbers say nothing of the weight; 0 where a rank is too large."""
        later = list(zip(self.whole_shapes[1:], self.ranks, self.widths, strict=True))
        if any(rank >= width for _, rank, width in later):
            return 0
        return sum(rank * (math.prod(shape) // width) for shape, rank, width in later)

    @property
    def plain(self) -> TTSpec:
        return self._plain

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of every core but the first, read as a matrix whose rows are its bond."""
        later = zip(self.cores[1:], self.whole_shapes[1:], strict=True)
        return tuple(math.prod(s[c.index(f"r{k}") + 1 :]) for k, (c, s) in enumerate(later, 1))

    def _stored_as(self, pivoted: int) -> TTSpec:
        axes = self.cores, self.sizes, self.rows, self.columns, self.batch
        modes = self.row_modes, self.column_modes, self.ranks
        spec = TTSpec.__new__(TTSpec)
        spec._set(*axes, modes, self.storage, pivoted)
        return spec

    def _like(self, ranks: Sequence[int], experts: int = 0) -> TTSpec:
        how = self.format, self.row_modes, self.column_modes, ranks
        return TTSpec._of(*how, experts, self.storage, self.pivoted)

    @classmethod
    def _of(
        cls,
        format: str | None,
        rows: Sequence[int],
        columns: Sequence[int],
        ranks: Sequence[int],
        experts: int,
        storage: str | None,
        pivoted: int,
    ) -> TTSpec:
        if format == BLOCK:
            (rank,) = ranks
            spec = cls.block(rows, columns, rank, experts=experts, storage=storage)
        else:
            spec = cls(rows, columns, ranks, experts=experts, storage=storage)
        return spec.in_order_of(pivoted) if pivoted else spec

    def to_dict(self) -> dict[str, Any]:
        experts = self.size["e"] if self.batch else 0
        return {
            "row_modes": list(self.row_modes),
            "column_modes": list(self.column_modes),
            "ranks": list(self.ranks),
            "experts": experts,
            **({"format": BLOCK} if self.is_block else {}),
            **({} if self.storage is None else {"storage": self.storage}),
            **({"pivoted": self.pivoted if self.pivoted > 1 else True} if self.pivoted else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TTSpec:
        known = {"format": None, "experts": 0, "storage": None, "pivoted": False}
        sizes = data["row_modes"], data["column_modes"], data["ranks"]
        if odd := data.keys() - known - {"row_modes", "column_modes", "ranks"}:
            raise ValueError(f"a spec has no {min(odd)}")
        form, experts, storage, pivoted = (data.get(name, usual) for name, usual in known.items())
        if form not in (None, BLOCK) or not isinstance(storage, str | None):
            raise ValueError(f"a spec of the format {form!r} whose storage is {storage!r}")
        if not isinstance(pivoted, int):
            raise ValueError(f"a spec of the format {form!r} whose pivoted is {pivoted!r}")
        spec = cls._of(form, *sizes, experts, storage, pivoted)
        if max(math.prod(spec.shape), spec.parameters) > MOST_ELEMENTS:
            raise ValueError(f"{spec} is larger than any weight")
        return spec

    def __repr__(self) -> str:
        given = f", experts={self.size['e']}" if self.batch else ""
        given += "" if self.storage is None else f", storage={self.storage!r}"
        how = "" if not self.pivoted else str(self.pivoted if self.pivoted > 1 else True)
        if how and self.format == LOW_RANK:
            sides = *self.shape[-2:], *self.ranks
            return f"TTSpec.low_rank{sides}".removesuffix(")") + f"{given}, pivoted={how})"
        without = ".in_order_of(1)" if how else ""
        if self.is_block:
            sizes = f"{self.row_modes}, {self.column_modes}, {self.ranks[0]}"
            return f"TTSpec.block({sizes}{given}){without}"
        return f"TTSpec({self.row_modes}, {self.column_modes}, {self.ranks}{given}){without}"
