"""Watch a model cut its vectors up, and learn which of the pieces are matrices that it multiplies.

Views of a vector lie in its memory: where a piece begins and what shape it has is read off there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensorize.base.tensors import is_index, is_plain, lies_in_memory
from tensorize.capture.forward import once, untouched
from tensorize.capture.matmul import Frame
from tensorize.capture.uses import read
from tensorize.capture.views import view
from tensorize.ir.sites import Batch
from tensorize.vectors.pieces import Piece


@dataclass
class Vector:
    """A vector of so many ``numbers``: the matrices cut of it, and what else uses its pieces."""

    numbers: int
    matrices: set[Piece] = field(default_factory=set)
    others: dict[Piece, str] = field(default_factory=dict)

    @property
    def why_not(self) -> str | None:
        """Why it cannot be held as its matrices; None where it can."""
        for piece, called in self.others.items():
            if not self.matrices or any(map(piece.meets, self.matrices)):
                return f"it is used by {called}, which is no matmul against a part of it"
        if not self.matrices:
            return "no use of it was seen"
        if any(a.meets(b) for a, b in pairwise(sorted(self.matrices))):
            return "its matrices have numbers in common"
        if all(max(p.shape) == p.end - p.begin for p in self.matrices):
            return "its matrices are single rows"
        return None

    def pieces(self) -> list[Piece]:
        """Its matrices and what lies between them, in order."""
        found, begin = [], 0
        for piece in sorted(self.matrices):
            if piece.begin > begin:
                found.append(Piece(begin, (piece.begin - begin,)))
            found.append(piece)
            begin = piece.end
        return found if begin == self.numbers else [*found, Piece(begin, (self.numbers - begin,))]


def find_vectors(model: nn.Module, batch: Batch) -> dict[str, Vector]:
    """What one run of a model does with each of its vectors, by their names."""
    watch = _Watch(model)
    with untouched(model), watch:
        once(model, batch)
    return watch.found


class _Watch(TorchFunctionMode):
    """Watches the calls that get a piece of a vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Vector] = {}
        self._memory: dict[int, str] = {}
        self._multiples: dict[int, tuple[str, Piece, Frame]] = {}
        self._alive: list[Tensor] = []  # a freed tensor's id may be given to another one
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and _has_own_memory(parameter):
                self.found[name] = Vector(parameter.numel())
                self._memory[parameter.untyped_storage().data_ptr()] = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and (seen := self._seen(value)) is not None:
                self._note(func, args, kwargs, value, seen, result)
        return result

    def _seen(self, tensor: Tensor) -> tuple[str, Piece, Frame] | None:
        """Of which vector a tensor is which piece, and how it is looked at."""
        name = self._name(tensor)
        if name is not None and tensor.is_contiguous():
            return name, Piece(int(tensor.storage_offset()), tuple(tensor.shape)), Frame()
        if id(tensor) in self._multiples:
            return self._multiples[id(tensor)]
        return None if name is None else (name, self._whole(name), Frame())

    def _whole(self, name: str) -> Piece:
        return Piece(0, (self.found[name].numbers,))

    def _name(self, tensor: Tensor) -> str | None:
        if not lies_in_memory(tensor):
            return None
        return self._memory.get(tensor.untyped_storage().data_ptr())

    def _note(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        tensor: Tensor,
        seen: tuple[str, Piece, Frame],
        result: Any,
    ) -> None:
        name, piece, frame = seen
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return  # asked for a shape, a dtype, a flag
        if len(piece.shape) > 1:
            if read(func, args, kwargs, tensor, frame) is not None:
                self.found[name].matrices.add(piece)
                return
            looked = view(func, args, kwargs, frame, tensor)
            if isinstance(looked, Frame):
                self._multiples[id(result)] = name, piece, looked
                self._alive.append(result)
                return
        called = getattr(func, "__name__", str(func))
        writes = called.endswith("_") and not called.endswith("__")
        if writes or any(self._name(leaf) != name for leaf in made):
            self.found[name].others.setdefault(piece, called)


def _has_own_memory(parameter: nn.Parameter) -> bool:
    """Whether floating-point numbers lie in memory that holds nothing else."""
    if not lies_in_memory(parameter) or not is_plain(parameter) or is_index(parameter):
        return False
    held = parameter.untyped_storage()
    return parameter.numel() > 1 and held.nbytes() == parameter.numel() * parameter.itemsize
