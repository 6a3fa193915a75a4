"""A matrix of integers of a few bits against x: a dense weight, or one factor of two.

y = x Wᵀ (or x W) + bias + added, W (M, N) read as codes, which are made numbers in registers: of
bytes no more are read than a code has bits. So many columns as share a scale are a whole number of
tiles, or one: a tile has one scale a row, and one zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorize.codegen.triton.module import Body, Source, assemble, row_block
from tensorize.codegen.triton.pair import axis_of, inner_loop
from tensorize.codegen.triton.roles import NotCovered, Tiles
from tensorize.codegen.triton.text import DOT, Axis, Dimension, Lines, Operand, power, quotient
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.precision import Precision

FEW_ROWS = 16
M, N = "m", "n"


@dataclass(frozen=True)
class CodedProduct:
    """One launch: a dense weight in codes, which side of it x meets, and what is added to y."""

    spec: QuantizedSpec
    contract: str = "columns"
    bias: bool = False
    added: bool = False

    def __post_init__(self) -> None:
        if len(self.spec.inner.core_shapes) != 1 or self.spec.batch:
            raise ValueError(f"{self.spec} is not one matrix in codes")
        if self.contract not in ("columns", "rows"):
            raise ValueError(f"contract is 'columns' or 'rows', got {self.contract!r}")


def default_tiles(product: CodedProduct, itemsize: int, rows: int) -> Tiles:
    """Tiles that fit on every target: for few rows many programs, as reading codes is all there is.

    None was timed on a GPU.
    """
    single, odd = itemsize == 4, any(size % 8 for size in product.spec.shape)
    inner = 32 if single else 64
    if rows <= FEW_ROWS:
        return Tiles(rows=DOT, inner=inner, outer=32, warps=4, stages=3)
    # Entries of odd sizes are read one by one, each by its own address.
    inner, outer = (32, 32) if odd else (inner, 64)
    return Tiles(rows=32 if single else 64, inner=inner, outer=outer, warps=8, stages=3)


def forward(product: CodedProduct, tiles: Tiles) -> Source:
    """The kernel: every program has a block of rows and a tile of outputs.

    Raises:
        NotCovered: the weight has no entries, or more than 32 bits count.
    """
    spec, kind = product.spec, product.spec.kind
    m, n = spec.shape
    if not m * n:
        raise NotCovered(f"{spec} has no entries")
    if m * n >= 1 << 31:
        raise NotCovered(f"{spec} has more entries than 32 bits count")
    inner, outer = (N, M) if product.contract == "columns" else (M, N)
    size = {M: m, N: n}
    x, y = (Operand.rows(name, (axis,), size) for name, axis in (("x", inner), ("y", outer)))
    bias, added = Operand.of("bias", (outer,), size), Operand.rows("added", (outer,), size)
    weight = _Weight(kind, m, n)
    tile = {
        inner: min(tiles.inner, power(size[inner], DOT)),
        outer: min(tiles.outer, power(size[outer], DOT)),
    }
    if kind.group is not None:
        tile[N] = min(tile[N], kind.group)
    block, side = (Axis("b", "b", "rows"),), (axis_of(outer, size[outer], tile[outer]),)
    met = (axis_of(inner, size[inner], tile[inner]),)
    text = Lines()
    row_block(text, tiles)
    text.vector(outer, f"part * {tile[outer]}", tile[outer])
    if outer == N:
        weight.find_group(text, f"part * {tile[N]}" if n > tile[N] else "0")
    text.zeros("y_tile", tiles.rows, tile[outer])
    with inner_loop(text, inner, "0", str(size[inner]), tile[inner], size[inner]):
        text.load("x_tile", x, (block, met))
        if inner == N:
            weight.find_group(text, "start" if n > tile[N] else "0")
        weight.load(text, (met, side), ragged=n % tile[N] > 0)
        text.dot("y_tile", "x_tile", "w")
    used = [x, *weight.operands]
    for wanted, operand, dimensions in (
        (product.bias, bias, (block, side)),
        (product.added, added, (block, side)),
    ):
        if wanted:
            text.load(f"{operand.name}_tile", operand, dimensions)
            text(f"y_tile += {operand.name}_tile.to(tl.float32)")
            used.append(operand)
    text.store(y, (block, side), "y_tile.to(y.dtype.element_ty)")
    body = Body(tuple(text.lines), (*used, y), quotient(size[outer], tile[outer]))
    return assemble("coded", _about(product), [body], inputs=used, outputs=[y], tiles=tiles)


def _about(product: CodedProduct) -> list[str]:
    spec, kind = product.spec, product.spec.kind
    of_codes = f"codes of {kind.bits} bits, made numbers in registers"
    each = "a row" if kind.group is None else f"{kind.group} columns of a row"
    what = "y = x Wᵀ" if product.contract == "columns" else "y = x W"
    more = "".join(f" + {name}" for name in ("bias", "added") if getattr(product, name))
    zero = ", and a zero point" if kind.offset else ""
    return [f"{what}{more}, W of {of_codes}.", "", f"W {spec.shape}: a scale for {each}{zero}."]


class _Weight:
    """What is read of a weight (M, N), and how a tile of it becomes numbers."""

    def __init__(self, kind: Precision, m: int, n: int) -> None:
        self._kind, self._columns, self._groups = kind, n, kind.groups(n)
        each = ((M, 1),) if kind.group is None else ((M, self._groups), ("group", 1))
        self._scale = Operand("scale", each)
        self.operands = [self._scale, Operand("codes", (), kind.dtype)]
        if kind.offset:
            self.operands.append(Operand("zeros", (), "uint8"))

    def find_group(self, text: Lines, first: str) -> None:
        """Which group the columns from the first on are of."""
        if self._kind.group is not None:
            text("group = 0" if first == "0" else f"group = {first} // {self._kind.group}")

    def load(self, text: Lines, tile: tuple[Dimension, Dimension], ragged: bool) -> None:
        """``w``: the numbers of a tile; ``ragged``: some of its columns may not be there."""
        place = next(k for k, (axis,) in enumerate(tile) if axis.name == M)
        rows, columns = tile[place], tile[1 - place]
        down, across = ("[:, None]", "[None, :]") if place == 0 else ("[None, :]", "[:, None]")

        def both(byte: str, count: int) -> tuple[Dimension, ...]:
            held = (Axis(byte, byte, count if ragged else None),)
            return (rows, held) if place == 0 else (held, rows)

        text.load("scale_tile", self._scale, (rows,))
        text("scale_tile = scale_tile.to(tl.float32)")
        self._unpack(text, "codes", self._columns, columns[0].variable, both, across)
        less = f" - {self._kind.middle}" if self._kind.middle else ""
        if self._kind.offset:
            self._unpack(text, "zeros", self._groups, "group", lambda *_: (rows,), "")
            less = f" - zeros_tile{down}"
        text(f"w = (codes_tile{less}).to(tl.float32) * scale_tile{down}")
        text("w = w.to(x.dtype.element_ty)")

    def _unpack(
        self,
        text: Lines,
        name: str,
        count: int,
        position: str,
        tile: Callable[[str, int], tuple[Dimension, ...]],
        spread: str,
    ) -> None:
        """The codes at some positions, from the planes of bytes that hold them.

        Args:
            name: of the tensor, whose rows hold so many codes; a tile of them is ``name_tile``.
            tile: what is loaded, by the variable that says which bytes, and how many there are.
            spread: how a vector of positions lies in it.
        """
        planes, parts = _planes(self._kind, count), []
        dtype = self._kind.dtype if name == "codes" else "uint8"
        row_bytes = sum(plane.bytes for plane in planes)
        for plane in planes:
            found, byte = f"{name}_{plane.name}", position
            if plane.each > 1:
                byte = f"{found}_byte"
                text(f"{byte} = {position} // {plane.each}")
            held = Operand(name, ((M, row_bytes), *plane.before, (byte, 1)), dtype)
            text.load(found, held, tile(byte, plane.bytes))
            if plane.each > 1:
                text(f"shift = {position} % {plane.each}" + f" * {plane.bits}" * (plane.bits > 1))
                text(f"{found} = ({found} >> shift{spread}) & {2**plane.bits - 1}")
            parts.append(f"({found} << {plane.shift})" if plane.shift else found)
        text(f"{name}_tile = {' | '.join(parts)}")


@dataclass(frozen=True)
class _Plane:
    """Bytes that hold some bits of every code: where they begin in a row, and how many they are."""

    name: str
    bits: int
    shift: int
    start: int
    bytes: int

    @property
    def each(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    @property
    def before(self) -> tuple[tuple[str, int], ...]:
        return ((str(self.start), 1),) if self.start else ()


def _planes(kind: Precision, count: int) -> list[_Plane]:
    """As ``algebra.packing`` packs so many codes: those of three bits lie in two planes."""
    if kind.bits == 3:
        low, high = quotient(count, 4), quotient(count, 8)
        return [_Plane("low", 2, 0, 0, low), _Plane("high", 1, 2, low, high)]
    return [_Plane("low", kind.bits, 0, 0, kind.packed(count))]
