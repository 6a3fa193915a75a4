"""What a module holds in place of a vector: its matrices, and what answers for the vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.vectors.pieces import Piece, pieces_of
from tensorize.weight.become import redefine, subclass
from tensorize.weight.lazy import ARITHMETIC, FactoredWeight, give_operators


class Stretch:
    """Numbers of a vector that follow each other, in some shape, while a model cuts the vector up.

    One of the vector's matrices in its own shape is that parameter, or what stands for it; any
    other view is again a stretch. Other functions get the numbers, in a tensor made for that call.

    Args:
        parts: every piece of the vector, in order, and what holds its values.
        piece: where the numbers begin, and their shape.
    """

    def __init__(self, parts: tuple[tuple[Piece, Any], ...], piece: Piece) -> None:
        self.parts, self.piece = parts, piece

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.piece.shape)

    @property
    def ndim(self) -> int:
        return len(self.piece.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][1].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0][1].device

    @property
    def requires_grad(self) -> bool:
        return any(value.requires_grad for _, value in self.parts)

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def dim(self) -> int:
        return len(self.piece.shape)

    def numel(self) -> int:
        return self.piece.end - self.piece.begin

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.piece.shape[0]

    def __repr__(self) -> str:
        return f"Stretch({self.piece})"

    def dense(self) -> Tensor:
        """Its numbers in one tensor, differentiably."""
        met = [(piece, value) for piece, value in self.parts if piece.meets(self.piece)]
        if not met:  # no numbers at all
            return torch.empty(self.piece.shape, dtype=self.dtype, device=self.device)
        values = [v.dense() if isinstance(v, FactoredWeight) else v for _, v in met]
        first = self.piece.begin - met[0][0].begin
        numbers = torch.cat([value.reshape(-1) for value in values])
        return numbers[first : first + self.numel()].reshape(self.piece.shape)

    def __getitem__(self, index: Any) -> Any:
        return Stretch.__torch_function__(torch.Tensor.__getitem__, (), (self, index))

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or method is None:
            raise AttributeError(name)
        if not callable(method):
            return getattr(self.dense(), name)
        return lambda *args, **kwargs: Stretch.__torch_function__(method, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Stretch):
            found = pieces_of(args[0].piece, func, args[1:], kwargs)
            if isinstance(found, Piece):
                return args[0].seen(found)
            if found is not None:
                return tuple(args[0].seen(piece) for piece in found)

        def plain(value: Any) -> Any:
            return value.dense() if isinstance(value, Stretch) else value

        args, keywords = pytree.tree_map(plain, (args, kwargs))
        return func(*args, **keywords)

    def seen(self, piece: Piece) -> Any:
        """What is there for a piece of the vector: a matrix, or a stretch."""
        for own, value in self.parts:
            if own == piece and len(piece.shape) > 1:
                return value
        return Stretch(self.parts, piece)


give_operators(Stretch, (*ARITHMETIC, "matmul", "rmatmul"))


class Matrices(nn.Module):
    """The pieces of one vector as parameters, each called after the place where it begins."""

    def __init__(self, vector: nn.Parameter, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.pieces = tuple(pieces)
        for piece in pieces:
            values = vector.detach()[piece.begin : piece.end].reshape(piece.shape).clone()
            self.register_parameter(_name_of(piece), nn.Parameter(values, vector.requires_grad))

    def forward(self) -> Stretch:
        parts = tuple((piece, getattr(self, _name_of(piece))) for piece in self.pieces)
        return Stretch(parts, Piece(0, (self.pieces[-1].end,)))

    def extra_repr(self) -> str:
        return f"a vector of {self.pieces[-1].end:,} numbers"


def _name_of(piece: Piece) -> str:
    return f"from_{piece.begin}"


def separate(owner: nn.Module, name: str, pieces: Sequence[Piece]) -> None:
    """Let a module hold the pieces of one of its vectors in place of the vector."""
    vector = owner._parameters.pop(name)
    assert vector is not None
    held = Matrices(vector, pieces)
    held.training = owner.training
    owner.add_module(_holder(name), held)
    redefine(owner, _separated_class(name, type(owner)))


def _holder(name: str) -> str:
    return f"{name}_matrices"


@cache
def _separated_class(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """``base`` with a stretch in place of a vector."""

    def get(owner: nn.Module) -> Stretch:
        return owner._modules[_holder(name)]()  # type: ignore[misc]

    return subclass(base, {name: property(get)}, _separated_class, name, base)
