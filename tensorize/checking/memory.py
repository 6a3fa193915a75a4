"""Integer sums of tensors in memory: any single word that changed is found, and put back exactly.

A tensor is looked at as words of integers in rows and columns. A word that changed by δ moves the
sum of its row and that of its column by δ, whatever its bits mean. Several are mended where no two
of them share a row, a column or a δ. What was written through PyTorch has another version, and is
no fault: its sums are made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize.base.tensors import lies_in_memory, plain_parts
from tensorize.checking.faults import Mend

SUMS, ARTEFACT = "sums", "the artefact's copy"

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

State = tuple[int, int]


def state_of(tensor: Tensor) -> State:
    """Where a tensor lies, and how often it was written to; equal where nobody wrote."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def words_of(tensor: Tensor) -> Tensor | None:
    """The memory of a tensor as integers (rows, columns); None where it is not in one piece."""
    if not lies_in_memory(tensor) or tensor.is_meta or tensor.is_complex():
        return None
    held = tensor.detach()
    axes = sorted(range(held.dim()), key=lambda axis: held.stride(axis), reverse=True)
    held = held.permute(axes)
    if held.numel() == 0 or not held.is_contiguous():
        return None
    words = held.reshape(-1).view(_WORDS[held.itemsize])
    return words.view(-1, _columns(tuple(held.shape)))


def _columns(shape: tuple[int, ...]) -> int:
    """The trailing axes that come nearest to the square root of all entries."""
    whole = math.prod(shape)
    ends = [math.prod(shape[k:]) for k in range(len(shape) + 1)]
    nearest = min(ends, key=lambda size: size + whole // size)
    if min(nearest, whole // nearest) > 1 or whole < 16:
        return nearest
    return next(size for size in range(math.isqrt(whole), 0, -1) if whole % size == 0)


@dataclass(frozen=True)
class Sums:
    """The sums of a tensor's words, modulo 2⁶⁴, and what it was when they were made."""

    state: State
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sums | None:
        """None where the tensor has no memory of its own to look at."""
        words = words_of(tensor)
        return None if words is None else cls(state_of(tensor), *_sums(words))

    def off(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """What the sums of rows and columns are off by now."""
        words = words_of(tensor)
        assert words is not None
        rows, columns = _sums(words)
        return rows - self.rows, columns - self.columns

    def mend(self, tensor: Tensor) -> int | None:
        """Put changed words back; how many. None: they are too many to be told apart, and stay.

        The tensor counts as not written to: it is what it was.
        """
        rows, columns = self.off(tensor)
        at_rows, at_columns = rows.nonzero().flatten(), columns.nonzero().flatten()
        if len(at_rows) == 0 == len(at_columns):
            return 0
        places = _pairs(rows[at_rows].tolist(), columns[at_columns].tolist())
        words = words_of(tensor)
        if places is None or words is None:
            return None
        words = words.data  # has a count of writes of its own
        i, j = at_rows[places[0]], at_columns[places[1]]
        damaged = words[i, j]
        words[i, j] = damaged - _wrapped(torch.tensor(places[2], device=words.device), words.dtype)
        if any(part.any() for part in self.off(tensor)):
            words[i, j] = damaged
            return None
        return len(i)

    def fits(self, values: Tensor) -> bool:
        """Whether other values have the very same sums."""
        words = words_of(values)
        if words is None:
            return False
        made = _sums(words)
        return all(torch.equal(a, b) for a, b in zip(made, (self.rows, self.columns), strict=True))


def _sums(words: Tensor) -> tuple[Tensor, Tensor]:
    return words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)


def _wrapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers of 64 bits modulo what a dtype holds."""
    low = torch.iinfo(dtype).bits
    if low == 64:
        return values
    values = values & (2**low - 1)
    return torch.where(values >= 2 ** (low - 1), values - 2**low, values).to(dtype)


def _pairs(rows: list[int], columns: list[int]) -> tuple[list[int], list[int], list[int]] | None:
    """Row, column and offset of every changed word; None: they cannot be told.

    All are in one row, or in one column, or no two have the same offset.
    """
    if len(rows) == 1:
        return [0] * len(columns), list(range(len(columns))), columns
    if len(columns) == 1:
        return list(range(len(rows))), [0] * len(rows), rows
    where = {off: k for k, off in enumerate(columns)}
    if sorted(rows) != sorted(columns) or len(where) != len(rows):
        return None
    return list(range(len(rows))), [where[off] for off in rows], rows


Copy = Callable[[str], Tensor | None]
"""What the artefact holds of a tensor, by name; None: nothing."""


class Memory:
    """The sums of every parameter and buffer of a model."""

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}
        self._names: Any = WeakTensorKeyDictionary()

    def remember(self, model: nn.Module) -> None:
        """Make all sums anew where something was written, or is new."""
        for name, tensor in _tensors(model):
            self._names[tensor] = name
            known = self.sums.get(name)
            if known is None or known.state != state_of(tensor):
                self._take(name, tensor)

    def take(self, model: nn.Module, tensors: Sequence[Tensor]) -> None:
        """Make the sums of some tensors anew."""
        if any(tensor not in self._names for tensor in tensors):
            for name, tensor in _tensors(model):
                self._names[tensor] = name
        for tensor in tensors:
            name = self._names.get(tensor)
            if name is not None:
                self._take(name, tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()  # of a copy nothing is known yet: its tensors lie elsewhere

    def _take(self, name: str, tensor: Tensor) -> None:
        made = Sums.of(tensor)
        if made is None:
            self.sums.pop(name, None)
        else:
            self.sums[name] = made

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether there are sums of all of them."""
        return all(self._names.get(tensor, "") in self.sums for tensor in tensors)

    def missing(self, model: nn.Module) -> list[str]:
        """The names of tensors without sums."""
        return [name for name, _ in _tensors(model) if name not in self.sums]

    @torch.no_grad()
    def scrub(
        self, model: nn.Module, copy: Copy, only: Sequence[Tensor] | None = None
    ) -> tuple[list[Mend], list[str]]:
        """Look at every tensor, or at some: what was mended, and what is damaged beyond that."""
        mends: list[Mend] = []
        lost: list[str] = []
        for name, tensor in _tensors(model):
            if only is not None and not any(tensor is one for one in only):
                continue
            sums = self.sums.get(name)
            if sums is None or sums.state != state_of(tensor):
                self._take(name, tensor)  # somebody wrote to it: that is what it is now
                continue
            count = sums.mend(tensor)
            if count:
                mends.append(Mend(name, count, SUMS))
            elif count is None and not self._replaced(name, tensor, copy, mends):
                lost.append(name)
        return mends, lost

    def _replaced(self, name: str, tensor: Tensor, copy: Copy, mends: list[Mend]) -> bool:
        """Whether the artefact has what the sums say; then the tensor is that again."""
        values = copy(name)
        if values is None or values.shape != tensor.shape or values.dtype != tensor.dtype:
            return False
        right = torch.empty_like(tensor).copy_(values)
        if not self.sums[name].fits(right):
            return False
        changed = int((_bits(tensor) != _bits(right)).sum())
        tensor.data.copy_(right)
        mends.append(Mend(name, changed, ARTEFACT))
        return True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_WORDS[tensor.itemsize])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, of a shard this process's part; not what counts faults."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(COUNT):
            continue
        parts = list(plain_parts(tensor))
        for k, part in enumerate(parts):
            yield (name if len(parts) == 1 else f"{name}[{k}]"), part


def held_by(module: nn.Module) -> list[Tensor]:
    """The ordinary tensors that a module's parameters and buffers are made of, in this process."""
    return [part for t in (*module.parameters(), *module.buffers()) for part in plain_parts(t)]


COUNT = "_faults_seen"
"""The buffer of a module that counts what a compiled graph found."""
