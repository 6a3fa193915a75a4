"""Batches of data cut into smaller ones: so that some can be held out, and memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError
from tensorize.capture.batches import moved
from tensorize.capture.forward import untouched
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch
from tensorize.passes.observe.outputs import call, essential
from tensorize.passes.stages import Found

_MOST = 16
_KEPT_BYTES = 1 << 28
"""What a backward pass may keep of a batch, of more than one sample."""
# Outputs of a part and of the whole may differ by what rounding does.
ALIKE = 1e-3


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
                places = [slice(first, None, count) for first in range(count)]
                if count > 1 and _is_whole(model, batch, whole, places):
                    return tuple(_part(batch, some) for some in places), ()
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


@dataclass(frozen=True)
class CutBatches:
    """Cuts calibration batches to so few samples that a backward pass keeps little of each.

    Batches stay as they are where the model gives for some samples anything else than for them
    among others, and where the caller's loss may do so (``whole``).
    """

    whole: bool = False
    name: str = "batches"

    def run(self, found: Found) -> Found:
        as_they_are = replace(found, summary="as they are")
        if self.whole:
            return as_they_are
        try:
            cut, together = cut_by_size(found)
        except ModelError:
            return as_they_are  # it takes no fewer samples than it was given
        if together is None:
            return as_they_are
        model, (first, _) = found.model, together.parts
        samples = _samples(cut.calibration[first])
        with untouched(model):
            both = essential(call(model, together.batch))
            if not _is_whole(model, together.batch, both, [slice(samples), slice(samples, None)]):
                return as_they_are
        counts = len(found.calibration), len(cut.calibration)
        summary = f"{counts[0]} cut into {counts[1]}, each kept within memory"
        return replace(cut, summary=summary)


@dataclass(frozen=True)
class Together:
    """Some samples of one batch, and the places of the parts that it was cut into with them."""

    batch: Batch
    parts: tuple[int, ...]


def cut_by_size(found: Found) -> tuple[Found, Together | None]:
    """The batches, cut to what a backward pass may keep of one.

    What it keeps is measured on two samples of the largest, and taken to grow with the number of
    inputs. Where any are cut, what the model gives for some samples together, and for the parts,
    tells whether that was right: of a model that has no values yet, later.
    """
    batches, model = found.calibration, found.model
    if all(_samples(batch) < 2 for batch in batches):
        return found, None
    largest = max(batches, key=entries_of)
    two = _part(largest, slice(2)) if _samples(largest) > 2 else largest
    device = next(model.parameters()).device
    with untouched(model):
        run = moved(two, device) if device.type == "meta" else two
        kept = _kept(found, run) / max(entries_of(two), 1)
    cut = {batch: _places(batch, kept) for batch in batches}
    if not cut[largest]:
        return found, None
    smaller: list[Batch] = []
    together = None
    for batch in batches:
        first = len(smaller)
        smaller += [_part(batch, some) for some in cut[batch]] or [batch]
        if batch is largest and cut[batch]:
            both = slice(0, cut[batch][1].stop)
            together = Together(_part(batch, both), (first, first + 1))
    return replace(found, calibration=tuple(smaller)), together


def _places(batch: Batch, kept: float) -> list[slice]:
    """The samples of every part of a batch, of whose entries a backward pass keeps so many bytes.

    None, where it is small enough.
    """
    samples = _samples(batch)
    bytes_ = kept * entries_of(batch)
    if samples < 2 or bytes_ <= _KEPT_BYTES:
        return []
    step = max(int(samples * _KEPT_BYTES / bytes_), 1)
    return [slice(start, start + step) for start in range(0, samples, step)]


def _kept(found: Found, batch: Batch) -> int:
    """Bytes that products with free weights are of: what they read, and what they give."""
    names = {site.name for site in found.free}
    wanted = [(name, p) for name, p in found.model.named_parameters() if name in names]
    total = 0

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in (matmul.x, output))
        return output

    with Observer(wanted, on_matmul):
        call(found.model, batch)
    return total


def entries_of(batch: Batch) -> int:
    """How many numbers a batch holds: what it takes to run it grows with them."""
    return sum(leaf.numel() for leaf in _leaves(batch))


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


def _part(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch."""

    def some(value: Any) -> Any:
        several = isinstance(value, Tensor) and value.dim() > 0
        return value[samples].contiguous() if several else value

    whole = batch.args, dict(batch.kwargs), batch.given
    args, kwargs, given = pytree.tree_map(some, whole)
    return replace(batch, args=args, kwargs=kwargs, given=given)


def _is_whole(model: nn.Module, batch: Batch, whole: Any, places: Sequence[slice]) -> bool:
    """Whether a model's outputs for parts of a batch are those that it gives for all at once."""
    samples = _samples(batch)
    wanted = {name: t for name, t in whole.items() if name != "loss"}
    if not wanted or any(t.dim() == 0 or len(t) != samples for t in wanted.values()):
        return False
    for some in places:
        try:
            got = essential(call(model, _part(batch, some)))
        except ModelError:
            return False  # an argument beside the tensors tells of all samples
        for name, tensor in wanted.items():
            mine, found = tensor[some], got.get(name)
            if found is None or found.shape != mine.shape:
                return False
            size = float(tensor.abs().max())
            if not torch.allclose(found, mine, rtol=0.0, atol=ALIKE * size, equal_nan=True):
                return False
    return True
