"""The identity behind every check: y · w = x · (Wᵀ w), whatever W is made of.

w are signs, one for each output, so that no fault cancels out because outputs have a mean of zero.
Wᵀ w is made once, in float64, through the factors themselves; it costs 1/r of the products it
checks, which are all that lie between x and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tensorize.base.tensors import is_index
from tensorize.checking.memory import State
from tensorize.formats.quantized import inputs_in_full
from tensorize.formats.registry import format_of
from tensorize.weight import products
from tensorize.weight.contractions import contractions
from tensorize.weight.lazy import FactoredWeight

COLUMNS, ROWS, LOOKUP = "columns", "rows", "lookup"

Weight = FactoredWeight | Tensor
"""A weight (M, N): lazy, or as numbers."""

_OTHER = {COLUMNS: ROWS, ROWS: COLUMNS, LOOKUP: COLUMNS}


def other_side(contract: str) -> str:
    """How signs of the outputs meet a weight, to give what inputs are to meet."""
    return _OTHER[contract]


_ROWS_AT_ONCE = 4096

_TRIED = 16
"""Signs that are tried for a weight."""

NARROW = (torch.bfloat16, torch.float16)
MANY = 12
"""Sums of a product of 16 bits. Rounding is so large there that a fault of several times its size
hides behind it in one of them, as its signs have it; in twelve it does not."""


@lru_cache(maxsize=256)
def _signs(size: int, count: int) -> Tensor:
    draw = torch.Generator().manual_seed(size)
    return torch.randint(0, 2, (count, size), generator=draw, dtype=torch.float64) * 2 - 1


def signs(size: int, device: torch.device) -> Tensor:
    """±1, always the same ones for a size."""
    return _signs(size, 1)[0].to(device)


def _signs_for(weight: Weight, contract: str, size: int) -> Tensor:
    """Of some, the signs by which what goes into the last factor shows best in the outputs."""
    tried = _signs(size, _TRIED).to(weight.device)
    if isinstance(weight, Tensor):
        if contract != COLUMNS:
            return tried[0]
        shown = times(weight, tried, ROWS)
        lengths = torch.linalg.vector_norm(weight.detach(), dim=0)
    elif weight.format.pair and not weight.spec.batch:
        left, right = weight.plain_cores
        last = (left if contract == COLUMNS else right.t()).detach().double()
        shown, lengths = tried @ last, last.norm(dim=0)
    else:
        return tried[0]
    shown = shown.abs() / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
    return tried[shown.min(dim=1).values.argmax()]


def working(dtype: torch.dtype) -> torch.dtype:
    """What checks of products of a dtype are computed in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def times(weight: Weight, x: Tensor, contract: str) -> Tensor:
    """x Wᵀ (``"columns"``) or x W (``"rows"``) in float64, of rows x (B, N) or (B, M)."""
    if isinstance(weight, Tensor):
        parts = weight.detach().split(_ROWS_AT_ONCE)  # a table in float64 may be gigabytes
        if contract == COLUMNS:
            return torch.cat([x @ part.double().t() for part in parts], dim=-1)
        met = zip(x.split(_ROWS_AT_ONCE, dim=-1), parts, strict=True)
        return sum((some @ part.double() for some, part in met), x.new_zeros(()))
    spec, cores = weight.looked_at()
    wide_cores = [core if is_index(core) else core.detach().double() for core in cores]
    planned = contractions(spec, str(x.device), x.dtype) if format_of(spec).planned else {}
    with inputs_in_full():
        return products.matmul(spec, planned, wide_cores, x, contract)


def unrounded(
    made: tuple[Weight, Tensor | None], x: Tensor, contract: str, *, otherwise: Tensor
) -> Tensor:
    """A product as kernels have it before they round it: only what is between two factors is
    rounded. ``otherwise``: what is taken for it of a weight that is no plain pair."""
    weight, bias = made
    if isinstance(weight, Tensor) or not weight.format.pair or weight.spec.pivoted:
        return otherwise
    left, right = (core.detach() for core in weight.plain_cores)
    first, second = (right.t(), left.t()) if contract == COLUMNS else (left, right)
    between = x.reshape(-1, x.shape[-1]) @ first
    y = between.float() @ second.float()
    return y if bias is None else y + bias.detach().float()


def shape_of(weight: Weight) -> tuple[int, int]:
    """(M, N) of the matrix itself, however it is looked at."""
    held = weight if isinstance(weight, Tensor) else weight.spec
    m, n = held.shape[-2:]
    return m, n


def rows_of(weight: Weight, some: Tensor) -> Tensor:
    """Some rows of W, by number."""
    if isinstance(weight, Tensor):
        return weight.detach()[some]
    spec, cores = weight.looked_at()
    return format_of(spec).lookup(spec, [core.detach() for core in cores], some)


def sizes_of_rows(weight: Weight) -> Tensor:
    """‖W_i‖ of every row (M,), in float64."""
    every = torch.arange(shape_of(weight)[0], device=weight.device).split(_ROWS_AT_ONCE)
    return torch.cat([rows_of(weight, some).double().norm(dim=-1) for some in every])


@dataclass(frozen=True)
class Vectors:
    """What the check of one use of a weight multiplies with, made of the weight as ``state`` says.

    ``signs`` meet the outputs; ``sums`` are Wᵀ signs, and meet the inputs (of a lookup: W signs,
    one number for each row of the table); ``offset`` (1,) is what the bias adds. ``back`` checks
    the gradient of the input: gx · ``in_signs`` = gy · ``back``. ``sizes``: of a lookup's rows.
    ``many``: signs, sums and offsets of ``MANY`` sums, for weights of 16 bits.
    """

    contract: str
    state: tuple[State, ...]
    signs: Tensor
    sums: Tensor
    offset: Tensor
    back: Tensor | None
    in_signs: Tensor | None
    sizes: Tensor | None
    many: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        weight: Weight,
        bias: Tensor | None,
        contract: str,
        state: tuple[State, ...],
        *,
        gradients: bool,
        outward: Tensor | None = None,
    ) -> Vectors:
        """Made in float64; ``outward``: the signs, where they are chosen already."""
        m, n = shape_of(weight)
        into, out = (n, m) if contract == COLUMNS else (m, n)
        device = weight.device
        if outward is None:
            outward = _signs_for(weight, contract, out)
        sums = times(weight, outward[None], other_side(contract))[0]
        offset = outward.new_zeros(1) if bias is None else (bias.detach().double() @ outward)[None]
        back = inward = sizes = None
        if contract == LOOKUP:
            sizes = sizes_of_rows(weight)
        elif gradients:
            inward = signs(into, device)
            back = times(weight, inward[None], contract)[0]
        many = None
        if weight.dtype in NARROW:
            every = torch.cat([outward[None], _signs(out, _TRIED + MANY)[1 - MANY :].to(device)])
            offsets = offset.new_zeros(MANY) if bias is None else every @ bias.detach().double()
            many = every.t().contiguous(), times(weight, every, other_side(contract)).t(), offsets
        return cls(contract, state, outward, sums, offset, back, inward, sizes, many)

    def to(self, dtype: torch.dtype) -> Vectors:
        """The same, rounded."""
        parts = (self.signs, self.sums, self.offset, self.back, self.in_signs, self.sizes)
        rounded = (None if part is None else part.to(dtype) for part in parts)
        many = None if self.many is None else tuple(part.to(dtype) for part in self.many)
        return Vectors(self.contract, self.state, *rounded, many)  # type: ignore[arg-type]

    def with_offsets(self, other: Vectors) -> Vectors:
        """With what the bias adds to another one."""
        many = self.many
        if many is not None and other.many is not None:
            many = (*many[:2], other.many[2])
        return replace(self, offset=other.offset, many=many)

    def differs(self, other: Vectors) -> bool:
        """Whether any of it is another number."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)

    @property
    def unfinished(self) -> bool:
        """Whether nothing was made for gradients, which it could be."""
        return self.back is None and self.contract != LOOKUP

    @property
    def _tensors(self) -> Sequence[Tensor | None]:
        many = (None, None, None) if self.many is None else self.many
        parts = self.signs, self.sums, self.offset, self.back, self.in_signs, self.sizes
        return *parts, *many

    def expected(self, x: Tensor) -> Tensor:
        """What y · signs is to be: of inputs (B, N), or row numbers (B,)."""
        if self.contract == LOOKUP:
            return self.sums[x]
        return torch.addmv(self.offset, x, self.sums)

    def off(self, x: Tensor, y: Tensor) -> Tensor:
        """How far each row of y (B, M) is off, either way; of many sums the worst."""
        if self.many is not None:
            signs, sums, offset = self.many
            expected = sums[x] if self.contract == LOOKUP else torch.addmm(offset, x, sums)
            return torch.addmm(expected, y, signs, beta=-1).abs().amax(-1)
        return torch.addmv(self.expected(x), y, self.signs, beta=-1)

    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        """What rounding is relative to, row by row; not finite where nothing is known.

        It is in proportion to what is rounded: of 16 bits that is y.
        """
        if self.sizes is not None:
            return self.sizes[x]
        lengths = torch.linalg.vector_norm(x, dim=-1)
        if self.many is None:
            return lengths
        outward = torch.linalg.vector_norm(y, dim=-1)
        outward = torch.where(torch.isfinite(outward), outward, 0.0)
        return torch.where(torch.isfinite(lengths), outward, lengths)
