"""``tensorize.inject``: bits that flip while a model runs, to see what notices."""

from __future__ import annotations

import contextlib
import random
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.base.errors import TensorizeError
from tensorize.base.tensors import plain_parts, unwrapped

WEIGHTS, INPUTS, INTERMEDIATES, ACCUMULATORS = PLACES = (
    "weights", "inputs", "intermediates", "accumulators",
)  # fmt: skip

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Flip:
    """One bit that flipped: of which weight's product, where, the entry (counted over all axes),
    the bit (0 the lowest), and the value before and after."""

    weight: str
    where: str
    entry: int
    bit: int
    before: float
    after: float


@contextlib.contextmanager
def inject(
    model: nn.Module,
    *,
    rate: float | None = None,
    per_second: float | None = None,
    where: str | Sequence[str] = PLACES,
    bits: Sequence[int] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Iterator[list[Flip]]:
    """Flip random bits in a model's products while it runs in this block: forward and backward.

    Yields the list of what was flipped, which grows. A flip in a weight stays in its memory, as if
    the memory had changed by itself; all others are of one product: what it read, what it gave (a
    result, or a sum on the way to another one), or a sum that it had not finished.

    Args:
        rate: the chance that a product is hit, in [0, 1].
        per_second: instead: so many hits a second, at the next product each.
        where: ``"weights"``, ``"inputs"``, ``"intermediates"``, ``"accumulators"``, or several.
        bits: which bits of a word may flip, 0 being the lowest; None: any.
        most: so many flips at most; None: no end.

    Raises:
        TensorizeError: not just one of the two rates is given, or a place is not known.

    Examples:
        >>> with tensorize.inject(dense, rate=1.0, where="intermediates") as flips:
        ...     _ = dense(*inputs)
        >>> [flip.weight for flip in flips]
        ['0.weight', '2.weight']
    """
    places = (where,) if isinstance(where, str) else tuple(where)
    if (rate is None) == (per_second is None) or not set(places) <= set(PLACES) or not places:
        raise TensorizeError(
            f"inject(rate={rate}, per_second={per_second}, where={where!r}) says nothing to do",
            way_out=f"give one of rate= and per_second=, and where= of {', '.join(PLACES)}",
        )
    mode = _Flipping(unwrapped(model), rate, per_second, places, bits, most, seed)
    with mode:
        yield mode.flips


class _Flipping(TorchDispatchMode):
    """Sees every operation, and hits some of those that read a weight."""

    def __init__(
        self, model: nn.Module, rate: float | None, per_second: float | None,
        places: Sequence[str], bits: Sequence[int] | None, most: int | None, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.flips: list[Flip] = []
        self._rate, self._every = rate, 1 / per_second if per_second else None
        self._next = time.perf_counter()
        self._places, self._bits, self._most = places, bits, most
        self._draw = random.Random(seed)
        held = [
            (name, part)
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1
            for part in plain_parts(parameter)
        ]
        self._names = {part.untyped_storage().data_ptr(): name for name, part in held}
        self._held = {part.untyped_storage().data_ptr(): part for _, part in held}
        self._made: dict[int, tuple[weakref.ref, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = self._read(args)
        if weight is None or func.is_view:
            return func(*args, **kwargs)
        name, tensor = weight
        others = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor) and a is not tensor]
        if not others:  # another form of the weight
            result = func(*args, **kwargs)
            self._follow(name, tensor, result)
            return result
        if not _multiplies(func) or not self._due():
            return func(*args, **kwargs)
        return self._hit(name, tensor, func, args, kwargs)

    def _read(self, args: Any) -> tuple[str, Tensor] | None:
        """The weight among the arguments of an operation, or what was made of it alone."""
        for value in args:
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                continue
            place = value.untyped_storage().data_ptr()
            if place in self._names:
                return self._names[place], value
            known = self._made.get(place)
            if known is not None and known[0]() is not None:
                return known[1], value
        return None

    def _follow(self, name: str, tensor: Tensor, result: Any) -> None:
        wide = isinstance(result, Tensor) and result.dtype is torch.float64 is not tensor.dtype
        if isinstance(result, Tensor) and result.is_floating_point() and not wide:
            self._made[result.untyped_storage().data_ptr()] = weakref.ref(result), name

    def _due(self) -> bool:
        if self._most is not None and len(self.flips) >= self._most:
            return False
        if self._rate is not None:
            return self._draw.random() < self._rate
        assert self._every is not None
        now = time.perf_counter()
        if now < self._next:
            return False
        self._next = max(self._next + self._every, now - self._every)
        return True

    def _hit(self, name: str, weight: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        where = self._draw.choice(self._places)
        if where == WEIGHTS:
            held = self._held.get(weight.untyped_storage().data_ptr(), weight)
            self._flip(name, where, held.data)
            return func(*args, **kwargs)
        if where == INPUTS:
            found = [
                k
                for k, value in enumerate(args)
                if isinstance(value, Tensor) and value is not weight
                and value.is_floating_point() and value.dim() > 1
            ]  # fmt: skip
            if not found:
                return func(*args, **kwargs)
            read = args[found[0]].clone(memory_format=torch.contiguous_format)
            self._flip(name, where, read)
            return func(*(read if k == found[0] else a for k, a in enumerate(args)), **kwargs)
        result = func(*args, **kwargs)
        if where == INTERMEDIATES:
            self._flip(name, where, result)
        else:
            self._flip_sum(name, result, weight, args)
        return result

    def _flip(self, name: str, where: str, tensor: Tensor) -> None:
        """Flip one bit of a tensor, in its memory."""
        flat = _flat(tensor)
        entry = self._draw.randrange(flat.numel())
        bit = self._bit(tensor.dtype)
        before = float(flat[entry])
        words = flat.view(_WORDS[tensor.itemsize])
        words[entry] ^= _mask(bit, 8 * tensor.itemsize)
        self.flips.append(Flip(name, where, entry, bit, before, float(flat[entry])))

    def _flip_sum(self, name: str, result: Tensor, weight: Tensor, args: Any) -> None:
        """Flip one bit of an entry's sum before all of its terms were added."""
        x = next(
            (a for a in args if isinstance(a, Tensor) and a is not weight and a.dim() == 2), None
        )
        matrix = weight if x is None or weight.shape[0] == x.shape[-1] else weight.t()
        fits = x is not None and weight.dim() == 2 and matrix.shape[0] == x.shape[-1]
        if not fits or result.shape != (x.shape[0], matrix.shape[1]):  # type: ignore[union-attr]
            return self._flip(name, ACCUMULATORS, result)
        assert x is not None
        entry = self._draw.randrange(result.numel())
        row, column = divmod(entry, result.shape[1])
        end = self._draw.randrange(1, x.shape[1] + 1)
        wide = torch.float32 if result.itemsize < 4 else result.dtype
        sum_so_far = (x[row, :end].to(wide) @ matrix[:end, column].to(wide)).reshape(1)
        bit = self._bit(wide)
        flipped = sum_so_far.clone()
        flipped.view(_WORDS[flipped.itemsize])[0] ^= _mask(bit, 8 * flipped.itemsize)
        before = float(result[row, column])
        result[row, column] += (flipped - sum_so_far)[0].to(result.dtype)
        after = float(result[row, column])
        self.flips.append(Flip(name, ACCUMULATORS, entry, bit, before, after))
        return None

    def _bit(self, dtype: torch.dtype) -> int:
        size = 8 * dtype.itemsize
        known = range(size) if self._bits is None else [bit for bit in self._bits if bit < size]
        return self._draw.choice(known)


def _flat(tensor: Tensor) -> Tensor:
    """The entries of a tensor as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _mask(bit: int, size: int) -> int:
    return -(2**bit) if bit == size - 1 else 2**bit


def _multiplies(func: Any) -> bool:
    """Whether an operation is a product, or reads rows of a table."""
    name = func.name()
    parts = ("mm", "linear", "matmul", "embedding", "convolution", "mv", "dot")
    return any(part in name.split("::")[-1] for part in parts) and "backward" not in name
