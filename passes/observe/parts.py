"""One batch of data cut into several, so that some can be held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError
from tensorize.capture.forward import untouched
from tensorize.ir.sites import Batch
from tensorize.passes.observe.outputs import call, essential

_MOST = 16
# Outputs of a part and of the whole may differ by what rounding does.
_ALIKE = 1e-3


def in_parts(
    model: nn.Module, batches: tuple[Batch, ...]
) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """The batches; a single one as up to 16 of some of its samples, and a note where it cannot be.

    It can be where all of its tensors have one length, and the model gives for some samples what
    it gives for them among all.
    """
    if len(batches) != 1:
        return batches, ()
    (batch,) = batches
    samples = _samples(batch)
    if samples > 1:
        with untouched(model):
            whole = essential(call(model, batch))
            # Some models squeeze an axis of one sample away.
            for count in dict.fromkeys((min(samples, _MOST), min(samples // 2, _MOST))):
                parts = [_part(batch, first, count) for first in range(count)]
                if count > 1 and _is_whole(model, whole, parts, samples):
                    return tuple(parts), ()
        why = "what the model gives for its samples depends on the others"
    elif samples == 1:
        why = "it is of one sample"
    else:
        why = "its tensors are not of one length"
    return batches, (
        f"few calibration data: one batch, which cannot be divided, as {why}: nothing was held "
        "out, so what is predicted was measured on what was learnt from, and new data may lose "
        "far more",
    )


def _leaves(batch: Batch) -> list[Tensor]:
    given = pytree.tree_leaves(batch.given)
    leaves = given and [*given, *pytree.tree_leaves((batch.args, dict(batch.kwargs)))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]


def _samples(batch: Batch) -> int:
    """The length that all tensors of a batch have; 0: they have none in common."""
    leaves = _leaves(batch)
    plain = all(leaf.layout == torch.strided and not leaf.is_nested for leaf in leaves)
    counts = {len(leaf) for leaf in leaves} if plain else set()
    return counts.pop() if len(counts) == 1 else 0


def _part(batch: Batch, first: int, step: int) -> Batch:
    """Every so many samples of a batch, from one of them on."""

    def some(value: Any) -> Any:
        several = isinstance(value, Tensor) and value.dim() > 0
        return value[first::step].contiguous() if several else value

    whole = batch.args, dict(batch.kwargs), batch.given
    args, kwargs, given = pytree.tree_map(some, whole)
    return replace(batch, args=args, kwargs=kwargs, given=given)


def _is_whole(model: nn.Module, whole: Any, parts: list[Batch], samples: int) -> bool:
    """Whether a model's outputs for the parts are those that it gives for all samples at once."""
    wanted = {name: t for name, t in whole.items() if name != "loss"}
    if not wanted or any(t.dim() == 0 or len(t) != samples for t in wanted.values()):
        return False
    for first, part in enumerate(parts):
        try:
            got = essential(call(model, part))
        except ModelError:
            return False  # an argument beside the tensors tells of all samples
        for name, tensor in wanted.items():
            mine, found = tensor[first :: len(parts)], got.get(name)
            if found is None or found.shape != mine.shape:
                return False
            size = float(tensor.abs().max())
            if not torch.allclose(found, mine, rtol=0.0, atol=_ALIKE * size, equal_nan=True):
                return False
    return True
