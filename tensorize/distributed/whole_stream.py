"""Styles in which every rank has the whole residual stream: Megatron's, and pairs one by one.

``"megatron"`` (Shoeybi et al. 2019) splits dense weights that read the stream by their rows, and
those that write it by their columns: one sum of the outputs of each attention and each MLP, and one
of the gradient of its inputs. ``"naive"`` does so where all weights of such a part are dense, and
splits any pair of factors by its rank, as if it were such a part: one sum of the outputs of each
weight, and one of the gradient of its inputs. Dense weights beside pairs give their outputs to all.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.distributed.guarding import sites_of_linear
from tensorize.distributed.layers import turn
from tensorize.distributed.matrices import COLUMNS, ROWS, Matrix, holder_of_bias, matrices_of
from tensorize.distributed.ranks import Ranks, fanned
from tensorize.distributed.shapes import shape_of
from tensorize.distributed.split import Split, part_of
from tensorize.weight.install import factored


class OneFan:
    """A tensor that so many linears of a rank read: the gradient of it is summed once."""

    def __init__(self, ranks: Ranks, readers: int) -> None:
        self.ranks, self.count = ranks, readers
        self._last: Any = None

    def __call__(self, reader: nn.Module, x: Tensor) -> Tensor:
        last = self._last
        if last is None or last[0]() is not x:
            last = self._last = [weakref.ref(x), fanned(x, self.ranks), self.count]
        last[-1] -= 1
        if not last[-1]:
            self._last = None  # nothing is kept alive once all have it
        return last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}


class NaiveSplit(Split):
    """Style ``"naive"``."""

    def ends(self, embedding: nn.Module, norm: nn.Module, head: nn.Module, tied: bool) -> None:
        self._norm(norm)
        self._alone(head)
        first, last = matrices_of(embedding, self.ranks)
        if first is None:
            turn(embedding, "summed embedding of rows", ranks=self.ranks, last=last)
            last.place(self.put, ROWS)
        else:
            turn(embedding, "embedding pair", ranks=self.ranks, first_matrix=first, last=last)
            self._by_rank(first, last)
        for name in self.shape.places:
            table = self.model.get_submodule(name)
            first, last = matrices_of(table, self.ranks)
            turn(table, "whole embedding", first_matrix=first, last=last)
            for matrix in (first, last):
                if matrix is not None:
                    matrix.place(self.put, None)

    def block(self, block: nn.Module) -> None:
        shape = self.shape
        attention: Any = block.get_submodule(shape.attention)
        for reading, closing in zip(shape.readings, shape.writers, strict=True):
            if reading.norm is not None:
                self._norm(block.get_submodule(reading.norm))
            readers = {name: block.get_submodule(name) for name in reading.linears}
            writer = block.get_submodule(closing)
            matrices = [matrices_of(each, self.ranks) for each in (*readers.values(), writer)]
            apart = all(first is None for first, _ in matrices)
            if apart:
                fan = OneFan(self.ranks, len(readers))
                for name, linear in readers.items():
                    self._reader(linear, fan, self.own_rows(name, attention))
                self._writer(writer)
            else:
                for linear in (*readers.values(), writer):
                    self._alone(linear)
            if closing.startswith(f"{shape.attention}."):
                self._heads(block, attention, apart)

    # ------------------------------------------------------------------------------- its modules

    def _heads(self, block: nn.Module, attention: Any, apart: bool) -> None:
        for name in self.shape.head_norms:
            if (norm := part_of(block, name)) is not None:
                turn(norm, "head norm" if apart else "whole rms norm", ranks=self.ranks)
                self.put(norm, "weight", Replicate())
        if apart:
            self.own_heads(attention)

    def _norm(self, norm: nn.Module) -> None:
        turn(norm, "whole rms norm" if self.shape.rms else "whole layer norm")
        self.put(norm, "weight", Replicate())
        self.put(norm, "bias", Replicate())

    def _reader(
        self,
        linear: nn.Module,
        fan: OneFan,
        rows: list[tuple[int, int]] | None = None,
        whole: bool = False,
    ) -> None:
        """A dense weight whose output is split; ``whole``: and then gathered."""
        _, last = matrices_of(linear, self.ranks)
        state = {"own_rows": rows, "whole": whole, "last": last}
        state |= {"first_matrix": None, "guard_sites": sites_of_linear}
        turn(linear, "dense reader", reading=fan, ranks=self.ranks, **state)
        last.place(self.put, ROWS if rows is None else None)
        self.put(linear, "bias", Shard(0) if rows is None else Replicate())

    def _writer(self, linear: nn.Module) -> None:
        _, last = matrices_of(linear, self.ranks)
        turn(linear, "summed dense writer", ranks=self.ranks, last=last)
        last.place(self.put, COLUMNS)
        self.put(linear, "bias", Replicate())

    def _alone(self, linear: nn.Module) -> None:
        """A weight that takes a whole input and gives a whole output."""
        first, last = matrices_of(linear, self.ranks)
        if first is None:
            self._reader(linear, OneFan(self.ranks, 1), whole=True)
            return
        turn(linear, "pair", ranks=self.ranks, first_matrix=first, last=last)
        self._by_rank(first, last)
        self.put(holder_of_bias(linear), "bias", Replicate())

    def _by_rank(self, first: Matrix, last: Matrix) -> None:
        first.place(self.put, ROWS)
        last.place(self.put, COLUMNS)

    # ------------------------------------------------------------------------------ what it takes

    @classmethod
    def refuse(cls, model: nn.Module, ranks: int) -> None:
        _refuse_experts(model)
        for name, weight in factored(model):
            odd = [rank for rank in weight.spec.ranks if rank % ranks]
            if odd:
                raise AnalysisError(
                    f"its rank is {odd[0]}, which {ranks} ranks of tp do not divide",
                    site=name,
                    way_out='style="btp", which splits no rank',
                )


class MegatronSplit(NaiveSplit):
    """Style ``"megatron"``."""

    @classmethod
    def refuse(cls, model: nn.Module, ranks: int) -> None:
        _refuse_experts(model)
        for name, weight in factored(model):
            if weight.spec.ranks:
                raise AnalysisError(
                    "it is of low rank, and Megatron's style splits dense weights",
                    site=name,
                    way_out='style="btp", or style="naive"',
                )


def _refuse_experts(model: nn.Module) -> None:
    if shape_of(model).experts is not None:
        raise CaptureError("it has experts, which this style does not split", way_out='style="btp"')
