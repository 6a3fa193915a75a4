"""Tensor parallelism for bottlenecks (BTP, after BOOST): the rank of a weight is never split.

The residual stream is split on the hidden dimension through all blocks. First factors take this
rank's part of it and give a partial product of rank r, the only thing that is reduced; second
factors give this rank's part of their output. The embedding gives a part of the stream, and the
head reads it as any other linear does. Dense weights that stayed take the stream whole and give
columns, or take columns and give a part of the stream, as Megatron's do.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard

from tensorize.distributed.experts import Stack
from tensorize.distributed.guarding import sites_of_linear
from tensorize.distributed.layers import turn
from tensorize.distributed.matrices import COLUMNS, ROWS, holder_of_bias, matrices_of
from tensorize.distributed.readings import OneReading
from tensorize.distributed.shapes import Experts
from tensorize.distributed.split import Split, part_of


class BottleneckSplit(Split):
    """Style ``"btp"``."""

    by_inputs = True

    @classmethod
    def refuse(cls, model: nn.Module, ranks: int) -> None:
        """It splits all that ``split_over`` lets through."""

    def ends(self, embedding: nn.Module, norm: nn.Module, head: nn.Module, tied: bool) -> None:
        self._norm(norm)
        self._readers([head], norm if self.shape.rms else None, whole=True)
        self._embedding(embedding, tied=tied)
        for name in self.shape.places:
            self._embedding(self.model.get_submodule(name), tied=False)

    def block(self, block: nn.Module) -> None:
        shape = self.shape
        for name in shape.head_norms:
            if (norm := part_of(block, name)) is not None:
                turn(norm, "head norm", ranks=self.ranks)
                self.put(norm, "weight", Replicate())
        attention: Any = block.get_submodule(shape.attention)
        for each in shape.readings:
            norm = None if each.norm is None else block.get_submodule(each.norm)
            if norm is not None:
                self._norm(norm)
            linears = [block.get_submodule(name) for name in each.linears]
            rows = [self.own_rows(name, attention) for name in each.linears]
            self._readers(linears, norm if shape.rms else None, rows)
        for name in shape.writers:
            self._writer(block.get_submodule(name))
        self.own_heads(attention)
        if shape.experts is not None:
            self._experts(block, shape.experts)

    # ------------------------------------------------------------------------------- its modules

    def _experts(self, block: nn.Module, names: Experts) -> None:
        self._norm(block.get_submodule(names.norm), "summed rms norm")
        router, experts = block.get_submodule(names.router), block.get_submodule(names.experts)
        first, last = matrices_of(router, self.ranks)
        turn(router, "router", ranks=self.ranks, first_matrix=first, last=last)
        if first is not None:
            first.place(self.put, COLUMNS)
        last.place(self.put, COLUMNS if first is None else None)
        opening = Stack(experts, names.opens, self.ranks, opens=True)
        closing = Stack(experts, names.closes, self.ranks, opens=False)
        turn(experts, "experts", ranks=self.ranks, opening=opening, closing=closing)
        opening.place(self.put)
        closing.place(self.put)

    def _norm(self, norm: nn.Module, way: str | None = None) -> None:
        way = way or ("rms norm" if self.shape.rms else "layer norm")
        turn(norm, way, ranks=self.ranks, width=self.sizes.hidden)
        self.put(norm, "weight", Shard(0))
        self.put(norm, "bias", Shard(0))

    def _readers(
        self,
        linears: list[nn.Module],
        norm: nn.Module | None,
        rows: list[list[tuple[int, int]] | None] | None = None,
        whole: bool = False,
    ) -> None:
        """Linears of one input, whose outputs are split; ``whole``: and then gathered."""
        found = [matrices_of(linear, self.ranks) for linear in linears]
        reading = OneReading(self.ranks, [first for first, _ in found], norm)
        for linear, own, (first, last) in zip(
            linears, rows or [None] * len(linears), found, strict=True
        ):
            side = ROWS if own is None else None
            turn(
                linear,
                "dense reader" if first is None else "factors",
                **{"reading": reading, "ranks": self.ranks, "own_rows": own, "whole": whole},
                **{"first_matrix": first, "last": last, "guard_sites": sites_of_linear},
            )
            if first is not None:
                first.place(self.put, COLUMNS)
            last.place(self.put, side)
            self.put(holder_of_bias(linear), "bias", Replicate() if side is None else Shard(0))

    def _writer(self, linear: nn.Module) -> None:
        """A linear whose input is split: of low rank it is a reader as any other."""
        first, last = matrices_of(linear, self.ranks)
        if first is not None:
            self._readers([linear], None)
            return
        known = {"last": last, "guard_sites": sites_of_linear}
        turn(linear, "dense writer", ranks=self.ranks, **known)
        last.place(self.put, COLUMNS)
        self.put(linear, "bias", Shard(0))

    def _embedding(self, table: nn.Module, tied: bool) -> None:
        first, last = matrices_of(table, self.ranks)
        if first is not None:
            turn(table, "embedding factors", ranks=self.ranks, first_matrix=first, last=last)
            first.place(self.put, COLUMNS)
            last.place(self.put, ROWS)
            return
        turn(table, "embedding of rows" if tied else "embedding", ranks=self.ranks, last=last)
        last.place(self.put, ROWS if tied else COLUMNS)
