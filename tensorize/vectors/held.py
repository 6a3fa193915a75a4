"""What a module holds in place of a vector: its matrices, and what answers for the vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.vectors.find import Piece
from tensorize.weight.become import redefine, subclass
from tensorize.weight.lazy import FactoredWeight


class Stretch:
    """Numbers of a vector whose matrices are kept apart, in some shape.

    A view that is one of the matrices is that parameter, or what stands for it; any other view is
    again a stretch. Every other function gets the numbers, in one tensor made for that call.

    Args:
        parts: every piece of the vector, in order, and what holds its values.
        shown: a tensor without values, a view of one as long as the vector.
    """

    def __init__(self, parts: tuple[tuple[Piece, Any], ...], shown: Tensor) -> None:
        self.parts, self.shown = parts, shown

    @property
    def shape(self) -> torch.Size:
        return self.shown.shape

    @property
    def ndim(self) -> int:
        return self.shown.dim()

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
        return self.shown.dim()

    def numel(self) -> int:
        return self.shown.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return len(self.shown)

    def __repr__(self) -> str:
        return f"Stretch({tuple(self.shape)} of {len(self.parts)} parts)"

    def dense(self) -> Tensor:
        """Its numbers in one tensor, differentiably."""
        shown, begin = self.shown, self.shown.storage_offset()
        if not shown.numel():
            return torch.empty(shown.shape, dtype=self.dtype, device=self.device)
        last = sum((n - 1) * step for n, step in zip(shown.shape, shown.stride(), strict=True))
        span = Piece(begin, (last + 1,))
        met = [(piece, value) for piece, value in self.parts if piece.meets(span)]
        values = (v.dense() if isinstance(v, FactoredWeight) else v for _, v in met)
        numbers = torch.cat([value.flatten() for value in values])
        return numbers.as_strided(shown.shape, shown.stride(), begin - met[0][0].begin)

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
        if func in _VIEWS and isinstance(args[0], Stretch):
            stretch = args[0]
            looked = func(stretch.shown, *args[1:], **kwargs)
            several = looked if isinstance(looked, tuple | list) else (looked,)
            if all(map(stretch._shows, several)):
                seen = tuple(map(stretch._seen, several))
                return seen if looked is several else seen[0]

        def plain(value: Any) -> Any:
            return value.dense() if isinstance(value, Stretch) else value

        args, keywords = pytree.tree_map(plain, (args, kwargs))
        return func(*args, **keywords)

    def _shows(self, view: Tensor) -> bool:
        """Whether a tensor without values is a view of the vector, and no copy."""
        return view.untyped_storage()._cdata == self.shown.untyped_storage()._cdata

    def _seen(self, view: Tensor) -> Any:
        if view.is_contiguous():
            piece = Piece(view.storage_offset(), tuple(view.shape))
            for own, value in self.parts:
                if own == piece and view.dim() > 1:
                    return value
        return Stretch(self.parts, view)


_VIEWS = {
    *(torch.Tensor.__getitem__, torch.Tensor.contiguous),
    *(torch.reshape, torch.Tensor.reshape, torch.Tensor.view),
    *(torch.narrow, torch.Tensor.narrow, torch.flatten, torch.Tensor.flatten),
    *(torch.split, torch.Tensor.split, torch.chunk, torch.Tensor.chunk),
    *(torch.unsqueeze, torch.Tensor.unsqueeze, torch.squeeze, torch.Tensor.squeeze),
    *(torch.unflatten, torch.Tensor.unflatten),
}


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def operate(stretch: Stretch, *others: Any) -> Any:
        return Stretch.__torch_function__(method, (), (stretch, *others))

    return operate


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs"),
    *("matmul", "rmatmul"),
):
    setattr(Stretch, f"__{_name}__", _operator(f"__{_name}__"))


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
        return Stretch(parts, torch.empty(self.pieces[-1].end, device="meta"))

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
