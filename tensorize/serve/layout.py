"""How weights that an engine merged into one layer are multiplied: which products, in what order.

All that meets the input of a layer is one product: first factors, each once, and dense weights.
Then each factored weight has a second product, and those of one first factor have it together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import CheckpointError
from tensorize.formats.registry import format_of
from tensorize.serve.matrices import Matrix, Weight, below, weight_of
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import SAVE_AGAIN

if TYPE_CHECKING:
    from tensorize.serve.folder import Folder


@dataclass(frozen=True)
class Part:
    """One weight of the checkpoint in one of an engine's layers; ``site``: None if it is dense."""

    name: str
    site: SiteRecord | None


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


# ------------------------------------------------------------------------------------- the layers


class MergedLinear:
    """A linear layer of an engine, merged or not, some or all of whose weights are factors.

    What is dense beside factors is loaded into ``weight`` by the order of the parts; the factors
    are taken from what waits once all is loaded. An engine's own class says how it multiplies by a
    matrix (``product``), and by which shares ranks have.
    """

    product: Callable[[Matrix, torch.device], nn.Module]
    integers = False
    """Whether the engine multiplies codes of eight bits."""

    def __init__(self, parts: list[Part], folder: Folder) -> None:
        self.parts, self.folder = parts, folder
        self.pieces: tuple[Piece, ...] = ()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self.dtype, self.columns = params_dtype, (input_size, input_size_per_partition)
        self.sizes = output_partition_sizes
        self.dense: dict[str, Tensor] = {}
        empty: Any = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        empty.weight_loader = self._keep
        layer.weight = empty

    def _keep(self, param: Tensor, loaded: Tensor, shard: Any = None) -> None:
        """Keep a dense part, of one of the shards that the engine's loaders name."""
        place = "qkv".index(shard) if isinstance(shard, str) else shard or 0
        self.dense[self.parts[place].name] = loaded

    def place(self, layer: Any, totals: Sequence[int], rank: int, world: int) -> None:
        """Make the products of a layer; ``totals``: the rows of its weights on all ranks together,
        without repetitions."""
        weights = [self._weight(part) for part in self.parts]
        columns = columns_of_rank(*self.columns, rank)
        each = (
            [(totals, self.sizes)]
            if len(weights) == 1  # which may have several sections
            else [([total], [size]) for total, size in zip(totals, self.sizes, strict=True)]
        )
        own = [
            weight.on_rank(rows_of_rank(*section, rank, world), columns)
            for weight, section in zip(weights, each, strict=True)
        ]
        layout = laid_out(own)
        device = layer.weight.device
        layer.across = nn.ModuleList(self.product(matrix, device) for matrix in layout.products)
        lasts = [piece.last for piece in layout.pieces]
        layer.lasts = nn.ModuleList(
            nn.Identity() if last is None else self.product(last, device) for last in lasts
        )
        # A call of one row is short: modules are not looked up, nor called as such, in it.
        self._across = [product.forward for product in layer.across]
        self._lasts = [last.forward for last in layer.lasts]
        whole = [slice(0, len(matrix.entries)) for matrix in layout.products]
        self._columns = [
            None if piece.columns == whole[piece.product] else piece.columns
            for piece in layout.pieces
        ]
        self.pieces, self.dense = layout.pieces, {}

    def _weight(self, part: Part) -> Weight:
        if part.site is not None:
            held, source = self.folder.take(part.site)
            spec = part.site.spec
            turn = self.folder.is_turned(part.site) and not format_of(spec).pair
            # In float32 a model is asked for what its weights say: inputs are not rounded.
            fast = self.integers and self.dtype != torch.float32
            return weight_of(spec, held, source, self.dtype, transposed=turn, integers=fast)
        if part.name not in self.dense:
            raise CheckpointError(
                "the checkpoint does not hold it", site=part.name, way_out=SAVE_AGAIN
            )
        return Weight(Matrix(self.dense[part.name].to(self.dtype)), None, part.name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(self.pieces) == 1 and self.pieces[0].last is not None:
            return self._lasts[0](self._across[0](x), bias)
        across = [product(x) for product in self._across]
        outputs = []
        for piece, columns, last in zip(self.pieces, self._columns, self._lasts, strict=True):
            found = across[piece.product]
            outputs.append(last(found if columns is None else found[..., columns].contiguous()))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


def sections(layer: Any, sizes: Sequence[int], *, of_attention: bool) -> list[int]:
    """The rows that the weights of an engine's layer have on all ranks together, without
    repetitions; ``of_attention``: it has queries, keys and values."""
    if of_attention:
        heads, groups = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, groups * layer.head_size, groups * layer.v_head_size]
    if len(sizes) > 1:
        return list(layer.output_sizes)
    return [layer.output_size]
