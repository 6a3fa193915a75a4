"""A rank's part of the matrices that weights are made of, whatever they are held as.

Matrices are (outputs, inputs): of low rank the first (r, n) meets the input and the second is
(m, r), of a dense weight there is one (m, n); experts have a stack of each. They are looked up at
every call, as FSDP2 puts parameters in their place only while a block runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tensorize.algebra.pivot import whole
from tensorize.distributed.ranks import Ranks, fanned
from tensorize.formats.quantized import Coded
from tensorize.weight.become import dense_class
from tensorize.weight.install import is_conv1d
from tensorize.weight.low_rank import LowRankLinear

Put = Callable[[nn.Module, str, Placement], None]
"""Splits a parameter or a buffer of a module, by its name there."""
ROWS, COLUMNS = 0, 1


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Matrix:
    """A parameter of a module; ``turned``: it holds (inputs, outputs); ``stacked``: one matrix for
    each of several experts."""

    def __init__(
        self, module: nn.Module, leaf: str, *, turned: bool = False, stacked: bool = False
    ) -> None:
        self.module, self.leaf, self.turned, self.stacked = module, leaf, turned, stacked

    @property
    def parameter(self) -> Tensor:
        found = self.module._parameters[self.leaf]
        assert found is not None
        return found

    def place(self, put: Put, side: int | None) -> None:
        """Split it by its rows or its columns; None: every rank holds all of it."""
        put(self.module, self.leaf, self._placement(side))

    def __call__(self) -> Tensor:
        """The numbers of this rank's part."""
        held = local(self.parameter)
        return held.t() if self.turned else held

    def columns(self) -> Tensor:
        """All of this rank's columns, with what is not stored."""
        return self()

    def order(self) -> Tensor:
        """Which of this rank's columns are an identity's and are not stored, then the others;
        empty where all are stored."""
        return torch.empty(0, dtype=torch.int32, device=self.parameter.device)

    def rows(self, ids: Tensor, padding: int | None) -> Tensor:
        """Rows by their number in this rank's part; that of ``padding`` does not train."""
        return F.embedding(ids, self(), padding)

    def _placement(self, side: int | None) -> Placement:
        return Replicate() if side is None else Shard((side ^ self.turned) + self.stacked)


class PivotedMatrix(Matrix):
    """A first factor [I | V'] in an order: as many columns of I are in the part of every rank.

    Args:
        module, leaf: what holds V' (r, n - r).
        holder: the module that has the order of all columns as a buffer.
    """

    def __init__(self, module: nn.Module, leaf: str, holder: nn.Module, ranks: Ranks) -> None:
        super().__init__(module, leaf)
        self.holder, self.ranks = holder, ranks

    def order(self) -> Tensor:
        order, rank = self.holder.get_buffer("order"), self.parameter.shape[0]
        each = len(order) // self.ranks.count
        own = [part[self.ranks.part(len(part))] for part in order.tensor_split([rank])]
        return torch.cat(own) - each * self.ranks.this

    def columns(self) -> Tensor:
        rest = self()
        eye = torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
        together = torch.cat([eye[:, self.ranks.part(len(rest))], rest], dim=1)
        return together.index_select(1, self.order().argsort())


class CodedMatrix(Matrix):
    """A matrix of integers of a few bits: what trains are its scales.

    By columns codes are split where no group of a scale and no byte is cut. Else every rank holds
    all of them, and makes the numbers of its own columns.
    """

    def __init__(self, cores: Any, number: int, ranks: Ranks, *, turned: bool = False) -> None:
        spec = cores.spec
        stacked = bool(spec.batch)
        super().__init__(cores, f"core_{number}", turned=turned, stacked=stacked)
        self.number, self.ranks, self.side = number, ranks, None
        self.kind, self.size = spec.kind, spec.inner.core_shapes[number][-1]
        self.unstored = number == 1 and bool(spec.inner.pivoted)

    def place(self, put: Put, side: int | None) -> None:
        self.side = None if side is None else side ^ self.turned
        split = self.side is not None and (self.side == ROWS or self._is_apart())
        placement = Shard(self.side + self.stacked) if split else Replicate()  # type: ignore[operator]
        one_for_all = self.side == COLUMNS and self.kind.group is None
        put(self.module, self.leaf, Replicate() if one_for_all else placement)
        if split:
            put(self.module, f"codes_{self.number}", placement)
        if self.side == ROWS:  # by columns there are few of them, in bytes that ranks would cut
            put(self.module, f"zeros_{self.number}", placement)

    def _is_apart(self) -> bool:
        each = self.size // self.ranks.count
        if self.unstored or self.kind.bits == 3:  # two planes, of two bits and of one
            return False
        return each % (self.kind.group or 1) == 0 and each * self.kind.bits % 8 == 0

    def __call__(self) -> Tensor:
        found = self._coded().values()
        if self.unstored:
            found = whole(found, self.module.get_buffer("order"))
        if self.side == COLUMNS and not self._is_apart():
            found = found[..., self.ranks.part(found.shape[-1])]
        return found.t() if self.turned else found

    def rows(self, ids: Tensor, padding: int | None) -> Tensor:
        if self.side == COLUMNS or self.turned:
            return super().rows(ids, padding)
        found = self._coded().at(ids.reshape(-1)).values().unflatten(0, ids.shape)
        if padding is None:
            return found
        return torch.where((ids == padding).unsqueeze(-1), found.detach(), found)

    def _coded(self) -> Coded:
        """What this rank holds; of scales that serve other ranks' columns, gradients are parts."""
        scale, buffers = local(self.parameter), self.module._buffers
        codes, zeros = (buffers.get(f"{each}_{self.number}") for each in ("codes", "zeros"))
        assert codes is not None
        codes, zeros, columns = local(codes), None if zeros is None else local(zeros), self.size
        if self.side == COLUMNS:
            if self.kind.group is None or not self._is_apart():
                scale = fanned(scale, self.ranks)
            if self._is_apart():
                columns //= self.ranks.count
        found = Coded(self.kind, columns, scale, codes, zeros)
        if self.side == COLUMNS and zeros is not None and self._is_apart():
            groups = self.kind.groups(self.size)
            found = found.with_zeros_of(groups, self.ranks.part(groups))
        return found


def matrices_of(linear: nn.Module, ranks: Ranks) -> tuple[Matrix | None, Matrix]:
    """The first factor (None: the weight is dense) and the second one, or the dense weight."""
    if isinstance(linear, LowRankLinear):
        first: Matrix = Matrix(linear.first, "weight")
        if linear.spec.pivoted:
            first = PivotedMatrix(linear.first, "weight", linear, ranks)
        return first, Matrix(linear.second, "weight")
    turned = is_conv1d(dense_class(linear))
    cores: Any = linear._modules.get("weight_cores")
    if cores is None:
        return None, Matrix(linear, "weight", turned=turned)
    return matrices_in(cores, ranks, turned=turned)


def matrices_in(cores: Any, ranks: Ranks, *, turned: bool = False) -> tuple[Matrix | None, Matrix]:
    """The same of cores, or of stacks of them."""
    spec, stacked = cores.spec, bool(cores.spec.batch)
    if spec.precision is not None:
        held = [
            CodedMatrix(cores, number, ranks, turned=turned)
            for number in range(len(spec.core_shapes))
        ]
        if turned:
            held.reverse()
        return (None, held[0]) if len(held) == 1 else (held[1], held[0])
    assert not turned
    first = Matrix(cores, "core_1", stacked=stacked)
    if spec.pivoted:
        first = PivotedMatrix(cores, "core_1", cores, ranks)
    return first, Matrix(cores, "core_0", stacked=stacked)


def holder_of_bias(linear: nn.Module) -> nn.Module:
    return linear.second if isinstance(linear, LowRankLinear) else linear
