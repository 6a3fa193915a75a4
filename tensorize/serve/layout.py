"""How weights that an engine merged into one layer are multiplied: which products, in what order.

All that meets the input of a layer is one product: first factors, each once, and dense weights.
Then each factored weight has a second product, and those of one first factor have it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorize.serve.matrices import Matrix, Weight, below


@dataclass(frozen=True)
class Piece:
    """Outputs of a layer: columns of one of its products, and the matrix that these meet then."""

    product: int
    columns: slice
    last: Matrix | None


@dataclass(frozen=True)
class Layout:
    """Products of the input, at most one of numbers and one of integers; the outputs in order."""

    products: tuple[Matrix, ...]
    pieces: tuple[Piece, ...]


def laid_out(weights: Sequence[Weight]) -> Layout:
    """The layout of weights of one input, whose outputs are beside each other."""
    kinds: dict[bool, list[Matrix]] = {}
    places: dict[str, Piece] = {}
    pieces: list[Piece] = []
    for weight in weights:
        across = weight.last if weight.first is None else weight.first
        place = places.get(weight.source) if weight.first is not None else None
        if place is None:
            own = kinds.setdefault(across.coded, [])
            start = sum(len(matrix.entries) for matrix in own)
            own.append(across)
            product = list(kinds).index(across.coded)
            place = Piece(product, slice(start, start + len(across.entries)), None)
            places[weight.source] = place
        pieces.append(replace(place, last=None if weight.first is None else weight.last))
    return Layout(tuple(below(own) for own in kinds.values()), tuple(_joined(pieces)))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that are one product are one piece."""
    found: list[Piece] = []
    for piece in pieces:
        before = found[-1] if found else None
        if before is None or before.product != piece.product:
            found.append(piece)
        elif before.last is None and piece.last is None:
            if before.columns.stop == piece.columns.start:
                columns = slice(before.columns.start, piece.columns.stop)
                found[-1] = replace(before, columns=columns)
            else:
                found.append(piece)
        elif (
            before.last is not None
            and piece.last is not None
            and before.columns == piece.columns
            and before.last.coded == piece.last.coded
        ):
            found[-1] = replace(before, last=below([before.last, piece.last]))
        else:
            found.append(piece)
    return found


# ------------------------------------------------------------------------------ tensor parallelism


def rows_of_rank(totals: Sequence[int], sizes: Sequence[int], rank: int, world: int) -> list[slice]:
    """Which rows of a weight one rank of several has.

    Args:
        totals: rows of the sections that the weight consists of.
        sizes: rows of each that a rank has. Keys and values may be fewer than ranks: then several
            ranks have the same.
    """
    found, start = [], 0
    for total, size in zip(totals, sizes, strict=True):
        replicas = max(world * size // total, 1)
        own = start + (rank // replicas * size if size < total else 0)
        found.append(slice(own, own + size))
        start += total
    return found


def columns_of_rank(total: int, size: int, rank: int) -> slice:
    """Which columns of a weight one rank of several has: all, or its share."""
    start = rank * size if size < total else 0
    return slice(start, start + size)
