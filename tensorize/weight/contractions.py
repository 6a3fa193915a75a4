"""The callables that contract an input with a weight, by what they are asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight.precision import autocast, multiplied_in

Contraction = Callable[..., Tensor]
"""``contract(x, cores, bias=None)``."""

Contractions = Mapping[str, Contraction]
"""The callables of one spec by what they contract: ``"columns"`` and ``"rows"``."""


@dataclass(frozen=True)
class Asked:
    """What a contraction is asked for by: a spec, which of its sides x meets, and where it runs.

    ``dtype`` is the one that is multiplied in; ``breakpoints`` are the batches at which the order
    is chosen anew (None: not known).
    """

    spec: TTSpec
    contract: str
    device: str
    dtype: str
    breakpoints: tuple[int, ...] | None


class Backend(Protocol):
    """What makes the callables of contractions."""

    def contraction(self, asked: Asked) -> Contraction:
        """How x meets a weight."""
        ...

    def turns(self, asked: Asked) -> tuple[int, ...]:
        """The batches at which another order of a contraction begins."""
        ...

    def breakpoints(self, uses: Sequence[tuple[Any, str]], device: str) -> tuple[int, ...]:
        """At most two batches at which the orders of all weights of a model change: specs, and the
        dtypes that they are multiplied in."""
        ...


_backend: Backend | None = None


def register_backend(backend: Backend) -> None:
    """Say what makes the callables."""
    global _backend
    _backend = backend
    contractions.cache_clear()


def _registered() -> Backend:
    if _backend is None:  # the file where passes and codegen meet registers one
        import_module("tensorize.api.wiring")
    assert _backend is not None
    return _backend


@lru_cache(maxsize=4096)
def contractions(
    spec: Spec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    breakpoints: tuple[int, ...] | None = None,
    memory_limit: int | None = None,
) -> Contractions:
    """How x meets a weight of this spec; low rank needs no plan: its two matmuls are the order.

    ``memory_limit``: the most elements that one call saves for its backward pass, the input among
    them; where they are more, the input alone is saved, and the rest is computed again. Low rank
    then has a plan too. Of trains and blocks whose identities are not stored it is for cores in
    which they have been put back.
    """
    form = format_of(spec)
    spec = spec.plain if form.planned else spec
    if not (form.planned or (form.indexed and memory_limit is not None)):
        return {}
    assert isinstance(spec, TTSpec)
    found = {}
    for contract in ("columns", "rows"):
        asked = Asked(spec, contract, device, multiplied_in(dtype, device), breakpoints)
        run = _Unplanned(asked) if spec.pivoted else _registered().contraction(asked)
        within = None if memory_limit is None else _batches_within(run, asked, memory_limit)
        found[contract] = _Differentiated(asked, memory_limit, run, within)
    return found


def common_breakpoints(
    uses: Sequence[tuple[Spec, torch.dtype]], device: str = "cpu"
) -> tuple[int, ...]:
    """The batches at which weights of these specs and dtypes, in one model, change their order."""
    planned = [(s.plain, multiplied_in(d, device)) for s, d in uses if format_of(s).planned]
    return _registered().breakpoints(planned, device) if planned else ()


_FAR = 2**62
"""More rows than there are."""


def _batches_within(run: Contraction, asked: Asked, limit: int) -> tuple[tuple[int, int], ...]:
    """Ranges of batches, ends included, at which autograd saves at most so many elements.

    They are counted on meta tensors: from turn to turn of the order they are a line in the batch.
    """
    found = []
    turns = () if asked.spec.pivoted else _registered().turns(asked)
    starts = (1, *turns, _FAR)
    for first, following in itertools.pairwise(starts if limit else ()):
        least, more = (_saved(run, asked, rows) for rows in (first, first + 1))
        if least <= limit:
            last = first + (limit - least) // max(1, more - least)
            found.append((first, min(last, following - 1)))
    return tuple(found)


def _saved(run: Contraction, asked: Asked, rows: int) -> int:
    """Elements that autograd saves of a call with so many rows, cores left out."""
    spec = asked.spec
    features = spec.shape[-1] if asked.contract == "columns" else spec.shape[-2]
    shapes = ((*spec.shape[:-2], rows, features), *spec.core_shapes)
    x, *cores = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    for index in spec.indices:
        cores.append(torch.empty(index.shape, dtype=getattr(torch, index.dtype), device="meta"))
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x, cores)
    for core in cores:
        sizes.pop(core.untyped_storage()._cdata, None)
    del y  # whose graph held what was counted, so that no storage was another's before
    return sum(sizes.values())


@dataclass(frozen=True)
class _Unplanned:
    """The one order in which x meets a pivoted weight."""

    asked: Asked

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        spec, contract = self.asked.spec, self.asked.contract
        return format_of(spec).multiply(spec, cores, x, contract, bias)


@dataclass(frozen=True, eq=False)
class _Differentiated:
    """A contraction, differentiated by autograd.

    ``within`` are the batches at which that saves no more than the limit (None: there is none).
    """

    asked: Asked
    memory_limit: int | None
    plain: Contraction
    within: tuple[tuple[int, int], ...] | None

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        if self.within is not None and self._is_over(x, cores):
            y: Any = checkpoint(
                self._run, x, cores, bias, use_reentrant=False, preserve_rng_state=False
            )
            return y
        return self._run(x, cores, bias)

    def _run(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            x, cores = autocast(x, cores)
        return self.plain(x, cores, bias)

    def _is_over(self, x: Tensor, cores: Sequence[Tensor]) -> bool:
        """Whether more would be saved than the limit; for x alone nothing but cores is."""
        if not torch.is_grad_enabled() or _transformed():
            return False
        if not any(core.requires_grad for core in cores):
            return False
        assert self.within is not None
        rows = math.prod(x.shape[len(self.asked.spec.batch) : -1])
        return not any(first <= rows <= last for first, last in self.within)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is run is compiled from text: a copy finds it again by the spec.
        return _again, (self.asked, self.memory_limit)


def _again(asked: Asked, memory_limit: int | None) -> Contraction:
    how = asked.device, getattr(torch, asked.dtype), asked.breakpoints, memory_limit
    return contractions(asked.spec, *how)[asked.contract]


def _transformed() -> bool:
    """Whether ``torch.func`` or forward mode is at work: they see through torch operations only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
