"""Whether a model does the same with factors in it: run both ways, every module's call compared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError, TensorizeError
from tensorize.base.tensors import is_index, is_wrapped
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.ir.sites import Batch

Calls = list[tuple[str, list[Tensor]]]
"""The modules that a run called, in the order in which they were done, with entries of what each
gave."""

_ENTRIES = 512
"""Of each output of a module, evenly spaced; of the whole model's a hundred times as many."""

_ROUNDINGS = 16
"""How many times what rounding does to a model two runs of it may differ."""


def calls_of(
    model: nn.Module,
    batch: Batch,
    paths: Sequence[str],
    watch: AbstractContextManager[Any] | None = None,
) -> Calls:
    """Run a model that nobody else uses, and look at what its modules give.

    Args:
        batch: it is copied, as a forward may write to it.
        paths: of the modules that are looked at.
        watch: is open while the model runs.
    """
    done: Calls = []
    handles = []
    for path in paths:
        entries = _ENTRIES if path else 100 * _ENTRIES

        def note(
            module: nn.Module, inputs: object, output: object, path: str = path, n: int = entries
        ) -> None:
            done.append((path, _entries(output, n)))

        handles.append(model.get_submodule(path).register_forward_hook(note))
    try:
        given = _copied(batch)
        beside = watch or contextlib.nullcontext()
        with untouched(model), fitting(model, given), _as_written(), beside:
            once(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return done


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Attention runs module by module: its fused path wants tensors, and leaves out padded rows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copied(batch: Batch) -> Batch:
    tensors = [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
    memo: dict[int, Any] = {
        id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors
    }
    args, kwargs = copy.deepcopy((batch.args, dict(batch.kwargs)), memo)
    return replace(batch, args=args, kwargs=kwargs)


def _entries(output: object, count: int) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and _has_entries(leaf):
            flat = leaf.detach().flatten()
            wide = torch.complex128 if flat.is_complex() else torch.float64
            found.append(flat[:: max(1, flat.numel() // count)].to("cpu", wide, copy=True))
    return found


def _has_entries(tensor: Tensor) -> bool:
    """Whether a tensor's entries can be looked at: not inside of vmap, nor of a sparse one."""
    return tensor.layout == torch.strided and not (tensor.is_nested or is_wrapped(tensor))


def difference(one: Calls, other: Calls) -> float:
    """The largest relative difference of what any module gave; infinite where others ran."""
    if [path for path, _ in one] != [path for path, _ in other]:
        return float("inf")
    worst = 0.0
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            return float("inf")
        for a, b in zip(ours, theirs, strict=True):
            both = a.isfinite() & b.isfinite()
            if not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            size = float(b[both].norm())
            if size > 0:
                worst = max(worst, float((a[both] - b[both]).norm()) / size)
            elif bool((a[both] != 0).any()):
                return float("inf")
    return worst


def unit_of(model: nn.Module) -> float:
    """The rounding of the coarsest dtype that a model computes in."""
    dtypes = {p.dtype for p in model.parameters() if not is_index(p)}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def differs(found: Calls, dense: Calls, unit: float, blurred: Callable[[], Calls]) -> bool:
    """Whether two runs differ by more than rounding explains.

    Args:
        unit: the rounding of the model's dtype.
        blurred: runs the dense model with weights that are rounded at random: asked for where the
            difference is not small as it is. A model that chooses by its values, or is random by
            itself, differs much there too.
    """
    apart = difference(found, dense)
    if apart <= unit**0.5:
        return False
    return all(apart > _ROUNDINGS * difference(blurred(), dense) for _ in range(2))


def to_blame(names: Sequence[str], wrong: Callable[[Sequence[str]], bool]) -> list[str]:
    """The weights for which ``wrong`` holds, found by halves; it is known to hold of all."""
    if len(names) < 2:
        return list(names)
    middle = len(names) // 2
    halves = names[:middle], names[middle:]
    found = [name for half in halves if wrong(half) for name in to_blame(half, wrong)]
    return found or list(names)


def words_of(error: TensorizeError) -> str:
    """What the model raised, in a line: its own error, where it is one."""
    raised = error.__cause__ if isinstance(error, ModelError) else error
    return f"{type(raised).__name__}: {raised}".partition("\n")[0]
