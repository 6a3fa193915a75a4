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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tensorize.api.forms import plain
from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.distributed.layers import turn
from tensorize.distributed.ranks import Ranks
from tensorize.distributed.readings import OneReading
from tensorize.distributed.shapes import Shape, Sizes
from tensorize.weight.install import factored
from tensorize.weight.low_rank import LowRankLinear


def split_over(model: nn.Module, shape: Shape, mesh: DeviceMesh) -> None:
    """Split a model over the ranks of a mesh of one dimension, in place.

    Low rank that stores no identity is stored whole first: its columns are no ranks' own.

    Raises:
        CaptureError: the ranks do not divide a size of it, or no rule is known for a parameter.
        AnalysisError: a weight is factorized in a way that no rule splits.
    """
    sizes = Sizes.of(model, shape)
    sizes.refuse(mesh.size())
    _refuse_other_formats(model)
    plain(model)
    _Split(model, shape, sizes, mesh).whole_model()


def _refuse_other_formats(model: nn.Module) -> None:
    for name, weight in factored(model):
        if weight.spec.precision is not None:
            what, out = "its entries are integers of a few bits", 'precision=None, or style "dp"'
        elif not weight.format.pair or weight.spec.batch:
            what, out = (
                f"it is {weight.format.title}",
                'formats="low_rank", or a mesh with dp alone',
            )
        else:
            continue
        raise AnalysisError(
            f"{what}, and only dense and low-rank weights are split over tp",
            site=name,
            way_out=out,
        )


class _Split:
    """A model that is being split."""

    def __init__(self, model: nn.Module, shape: Shape, sizes: Sizes, mesh: DeviceMesh) -> None:
        self.model, self.shape, self.sizes, self.mesh = model, shape, sizes, mesh
        self.ranks = Ranks.of(mesh)
        # Parameters by identity: what several modules hold stays one.
        self.made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.placed: set[int] = set()

    def whole_model(self) -> None:
        model, shape = self.model, self.shape
        head, embedding = (model.get_submodule(name) for name in (shape.head, shape.embedding))
        norm, tied = model.get_submodule(shape.norm), _table(embedding) is _table(head)
        for block in shape.of_blocks(model):
            self.block(block)
        self.norm(norm)
        reading = OneReading(self.ranks, [head], norm if shape.rms else None)
        self.reader(head, reading, whole=True)
        self.embedding(embedding, tied=tied)
        for name in shape.places:
            self.embedding(model.get_submodule(name), tied=False)
        for name, parameter in model.named_parameters():
            if id(parameter) not in self.placed:
                raise CaptureError(
                    "no rule says how this parameter is split over tp",
                    site=name,
                    way_out="a mesh with dp alone",
                )

    def block(self, block: nn.Module) -> None:
        shape = self.shape
        for name in shape.head_norms:
            if (norm := _part(block, name)) is not None:
                turn(norm, "head norm", ranks=self.ranks)
                self.put(norm, "weight", Replicate())
        attention: Any = block.get_submodule(shape.attention)
        for each in shape.readings:
            norm = None if each.norm is None else block.get_submodule(each.norm)
            if norm is not None:
                self.norm(norm)
            linears = [block.get_submodule(name) for name in each.linears]
            reading = OneReading(self.ranks, linears, norm if shape.rms else None)
            for name, linear in zip(each.linears, linears, strict=True):
                self.reader(linear, reading, rows=self.rows(name, attention))
        for name in shape.writers:
            self.writer(block.get_submodule(name))
        if shape.fused is not None:
            attention.split_size //= self.ranks.count
        elif self.sizes.keys < self.ranks.count:
            attention.num_key_value_groups = self.sizes.heads // self.ranks.count

    def rows(self, name: str, attention: Any) -> list[tuple[int, int]] | None:
        """First and number of this rank's rows, of a weight that is not split in a row."""
        count, this = self.ranks.count, self.ranks.this
        if name == self.shape.fused:  # queries, then keys, then values
            each = attention.split_size // count
            return [(k * attention.split_size + this * each, each) for k in range(3)]
        if name in self.shape.keys and self.sizes.keys < count:
            head = this * self.sizes.keys // count
            return [(head * attention.head_dim, attention.head_dim)]
        return None

    # ------------------------------------------------------------------------------- its modules

    def norm(self, norm: nn.Module) -> None:
        turn(norm, "rms norm" if self.shape.rms else "layer norm", ranks=self.ranks)
        norm.width = self.sizes.hidden  # type: ignore[assignment]
        self.put(norm, "weight", Shard(0))
        self.put(norm, "bias", Shard(0))

    def reader(
        self,
        linear: nn.Module,
        reading: OneReading,
        rows: list[tuple[int, int]] | None = None,
        whole: bool = False,
    ) -> None:
        """A linear whose output is split; ``whole``: and then gathered."""
        by_rows = Shard(0) if rows is None else Replicate()
        state = {"reading": reading, "ranks": self.ranks, "rows": rows, "whole": whole}
        if isinstance(linear, LowRankLinear):
            turn(linear, "low rank", turned=False, **state)
            self.factors(linear.first, "weight", linear.second, "weight", by_rows)
            self.put(linear.second, "bias", by_rows)
            return
        if (cores := _cores(linear)) is not None:
            turn(linear, "low rank cores", turned=False, **state)
            self.factors(cores, "core_1", cores, "core_0", by_rows)
        else:
            turned = _is_turned(linear)
            turn(linear, "dense reader", turned=turned, **state)
            self.put(linear, "weight", Shard(1) if turned and rows is None else by_rows)
        self.put(linear, "bias", by_rows)

    def writer(self, linear: nn.Module) -> None:
        """A linear whose input is split: of low rank it is a reader as any other."""
        if isinstance(linear, LowRankLinear) or _cores(linear) is not None:
            self.reader(linear, OneReading(self.ranks, [linear]))
            return
        turned = _is_turned(linear)
        turn(linear, "dense writer", ranks=self.ranks, turned=turned)
        self.put(linear, "weight", Shard(0 if turned else 1))
        self.put(linear, "bias", Shard(0))

    def factors(
        self, first: nn.Module, first_leaf: str, second: nn.Module, leaf: str, by_rows: Placement
    ) -> None:
        self.put(first, first_leaf, Shard(1))
        self.put(second, leaf, by_rows)

    def embedding(self, table: nn.Module, tied: bool) -> None:
        if (cores := _cores(table)) is not None:
            turn(table, "embedding cores", ranks=self.ranks)
            self.factors(cores, "core_1", cores, "core_0", Shard(0))
            return
        turn(table, "embedding of rows" if tied else "embedding", ranks=self.ranks)
        self.put(table, "weight", Shard(0 if tied else 1))

    def put(self, module: nn.Module, leaf: str, placement: Placement) -> None:
        """Split a parameter, once under all of its names."""
        parameter = module._parameters.get(leaf)
        if parameter is None or id(parameter) in self.placed:
            return
        if id(parameter) not in self.made:
            # No rank is asked: all hold the same values (``check_same``).
            shared = distribute_tensor(parameter.data, self.mesh, [placement], src_data_rank=None)
            made = nn.Parameter(shared, requires_grad=parameter.requires_grad)
            self.made[id(parameter)] = parameter, made
            self.placed.add(id(made))
        module._parameters[leaf] = self.made[id(parameter)][1]


def _part(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _cores(module: nn.Module) -> nn.Module | None:
    return module._modules.get("weight_cores")


def _table(module: nn.Module) -> Any:
    """What two modules of one dense weight have in common."""
    return module._parameters.get("weight") if _cores(module) is None else _cores(module)


def _is_turned(linear: nn.Module) -> bool:
    """Whether a dense linear holds (in, out), as GPT-2's do."""
    return not isinstance(linear, nn.Linear)
