"""How fast compressed models are beside the dense one: times of whole calls, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base import printer, timer
from tensorize.base.records import by_field, plain
from tensorize.base.tensors import device_of
from tensorize.capture.forward import once, untouched
from tensorize.capture.inputs import needed
from tensorize.evaluation.energy import joules_of
from tensorize.ir.sites import Batch


@dataclass(frozen=True)
class Timed:
    """Seconds of a call of one model with so many samples, and the dense one's over that.

    ``joules``: what the machine used for a call; None where it has no counter that can be read.
    """

    model: str
    samples: int
    seconds: float
    speedup: float
    joules: float | None = None


@dataclass(frozen=True)
class Speeds:
    """A table of times: ``str()`` prints it."""

    timed: tuple[Timed, ...]

    def __str__(self) -> str:
        rows = [
            (
                *(t.model, t.samples, printer.seconds(t.seconds), f"{t.speedup:.2f}"),
                printer.number(t.joules),
            )
            for t in self.timed
        ]
        return printer.table(("model", "samples", "a call", "over dense", "joules a call"), rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data."""
        return plain(by_field(self))


def speeds(
    models: Mapping[str, nn.Module],
    dense: nn.Module,
    *,
    example_inputs: Any = None,
    samples: Sequence[int] = (1, 16),
    compiled: bool = False,
) -> Speeds:
    """Times of models and of the dense one, in turn over some rounds; medians.

    Args:
        example_inputs: as in ``tensorize.compile``; their first sample is repeated.
        samples: how many samples a call has.
        compiled: also the dense model through ``torch.compile``, and the others through
            ``torch.compile(model, backend="tensorize")``.

    Raises:
        CaptureError: no inputs are known, or a model does not run on them.
    """
    batch = needed(dense, example_inputs, "no inputs are known to time with")
    every = {"dense": dense, **models}
    calls: dict[str, Any] = dict(every)
    if compiled:
        calls["dense, compiled"] = torch.compile(dense)
        calls |= {
            f"{n}, compiled": torch.compile(m, backend="tensorize") for n, m in models.items()
        }
    found: list[Timed] = []
    with contextlib.ExitStack() as stack:
        for model in every.values():
            stack.enter_context(untouched(model))
            once(model, batch)  # timed runs are not watched: what they write is seen by this
        for count in samples:
            repeated = _repeated(first_sample(batch), count)
            seconds = times(list(calls.values()), repeated)
            energy = joules([*calls.values()], repeated)
            found += [
                Timed(name, count, took, seconds[0] / took, used)
                for name, took, used in zip(calls, seconds, energy, strict=True)
            ]
    return Speeds(tuple(found))


def times(models: Sequence[nn.Module], batch: Batch) -> list[float]:
    """Seconds of a call of each model, in turn."""
    return timer.seconds_in_turn(_calls(models, batch), device_of(models[0]))


def joules(models: Sequence[nn.Module], batch: Batch) -> list[float | None]:
    """What the machine uses for a call of each model; None where no counter can be read."""
    return [joules_of(each, device_of(models[0])) for each in _calls(models, batch)]


def _calls(models: Sequence[nn.Module], batch: Batch) -> list[Callable[[], object]]:
    return [partial(model, *batch.args, **batch.kwargs) for model in models]


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch: of every tensor with as many entries as the first tensor."""
    tensors = [t for t in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if _has_samples(t)]
    if not tensors:
        return batch
    count = len(tensors[0])

    def cut(value: Any) -> Any:
        return value[:1] if _has_samples(value) and len(value) == count else value

    args, kwargs = pytree.tree_map(cut, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, kwargs or args)


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _repeated(sample: Batch, count: int) -> Batch:
    """So many times the same sample: every tensor whose first axis is that of samples."""

    def repeat(value: Any) -> Any:
        many = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
        return value.expand(count, *value.shape[1:]).contiguous() if many else value

    args, kwargs = pytree.tree_map(repeat, (sample.args, dict(sample.kwargs)))
    return Batch(args, kwargs, kwargs or args)
