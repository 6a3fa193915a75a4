"""A model that is being split over the ranks of ``tp``, whatever the style: what all of them do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, distribute_tensor

from tensorize.base.errors import CaptureError
from tensorize.distributed.ranks import Ranks
from tensorize.distributed.shapes import Shape, Sizes


class Split(ABC):
    """A style of splitting a model; what several modules hold stays one."""

    def __init__(self, model: nn.Module, shape: Shape, sizes: Sizes, mesh: DeviceMesh) -> None:
        self.model, self.shape, self.sizes, self.mesh = model, shape, sizes, mesh
        self.ranks = Ranks.of(mesh)
        # Tensors by identity.
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._placed: set[int] = set()

    by_inputs = False
    """Whether first factors are split by their columns: of those without an identity in parts."""

    @classmethod
    @abstractmethod
    def refuse(cls, model: nn.Module, ranks: int) -> None:
        """Raises AnalysisError for a weight that the style does not split."""

    @abstractmethod
    def ends(self, embedding: nn.Module, norm: nn.Module, head: nn.Module, tied: bool) -> None:
        """Split what stands before the first block and after the last one."""

    @abstractmethod
    def block(self, block: nn.Module) -> None: ...

    def whole_model(self) -> None:
        model, shape = self.model, self.shape
        names = shape.embedding, shape.norm, shape.head
        embedding, norm, head = (model.get_submodule(name) for name in names)
        tied = _table(embedding) is _table(head)
        for block in shape.of_blocks(model):
            self.block(block)
        self.ends(embedding, norm, head, tied)
        for name, parameter in model.named_parameters():
            if id(parameter) not in self._placed:
                raise CaptureError(
                    "no rule says how this parameter is split over tp",
                    site=name,
                    way_out="a mesh with dp alone",
                )

    def put(self, module: nn.Module, leaf: str, placement: Placement) -> None:
        """Split a parameter, once under all of its names, or a buffer; nothing where none is."""
        held = module._parameters if leaf in module._parameters else module._buffers
        tensor = held.get(leaf)
        if tensor is None or id(tensor) in self._placed:
            return
        if id(tensor) not in self._made:
            # No rank is asked: all hold the same values (``check_same``).
            made = distribute_tensor(tensor.data, self.mesh, [placement], src_data_rank=None)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._made[id(tensor)] = tensor, made
            self._placed.add(id(made))
        held[leaf] = self._made[id(tensor)][1]  # type: ignore[assignment]

    def own_heads(self, attention: Any) -> None:
        """Let attention see this rank's heads alone."""
        if self.shape.fused is not None:
            attention.split_size //= self.ranks.count
        elif self.sizes.keys < self.ranks.count:
            attention.num_key_value_groups = self.sizes.heads // self.ranks.count

    def own_rows(self, name: str, attention: Any) -> list[tuple[int, int]] | None:
        """First and number of this rank's rows, of a weight that is not split in a row."""
        count, this = self.ranks.count, self.ranks.this
        if name == self.shape.fused:  # queries, then keys, then values
            each = attention.split_size // count
            return [(k * attention.split_size + this * each, each) for k in range(3)]
        if name in self.shape.keys and self.sizes.keys < count:
            head = this * self.sizes.keys // count
            return [(head * attention.head_dim, attention.head_dim)]
        return None


def part_of(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _table(module: nn.Module) -> Any:
    """What two modules of one weight have in common."""
    cores = module._modules.get("weight_cores")
    held = module._parameters.get("weight") if cores is None else cores._parameters["core_0"]
    return module if held is None else held
