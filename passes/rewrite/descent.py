"""Gradient steps on factors: Adam (Kingma & Ba 2015), each step relative to the parameter's size.

A polish and a healing are one descent: how large steps may be, how they grow and shrink over a
run, the copies that they are taken on, the order of the data, and the best values that are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tensorize.base.sharded import is_sharded, mean_over, mesh_of, split_as, whole
from tensorize.base.tensors import singled, squared

# The largest relative step of a core is this times the square root of the damage, measured on two
# trained decoders at damages from .001 to .4: half of it learns slower, twice as much overshoots.
_RATE, _LARGEST_RATE = 0.035, 0.03
_WARM_UP = 0.1
BETAS = (0.9, 0.95)


def rate_for(damage: float) -> float:
    """The largest relative step: a model that is off by little is not to be moved by much."""
    return min(_RATE * math.sqrt(max(damage, 0.0)), _LARGEST_RATE)


def share_of_rate(done: int, steps: int) -> float:
    """The step after ``done`` of ``steps``, as a share of the largest: a warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
    return min(1.0, (done + 1) / (_WARM_UP * steps)) * cosine


def relative_groups(
    parameters: Sequence[Tensor], rate: float, smallest: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one a parameter, whose rate is ``rate`` times its size.

    The size is the root mean square of the entries, at least ``smallest``: biases may be zero.
    """
    sizes = [float(squared(singled(p.detach())).mean().sqrt()) for p in parameters]
    return [
        {"params": [p], "lr": rate * max(size, smallest)}
        for p, size in zip(parameters, sizes, strict=True)
    ]


@dataclass
class State:
    """All of a descent but the tensors; the distances are ``judge``'s."""

    before: float
    best: float
    done: int = 0
    best_step: int = 0
    scale: float = 1.0
    idle: int = 0
    retreats: int = 0
    stopped: bool = False


@dataclass(eq=False)
class Descent:
    """Adam on parameters in place; the best values are kept, and in the end put there.

    Steps are taken on float32 copies: in half precision small ones would be rounded away. Where
    parameters are sharded all of their processes descend together: each learns from batches of its
    own, and what is decided by is the mean of what they have.

    Args:
        learn: the loss of the batch at a position, differentiable.
        judge: what the best values have least of; ``before`` is what it said at first.
        steps, every: how many there are, and after how many to judge.
        rate, smallest: the largest step, relative to a parameter's size; the least such size.
        patience: after so many looks in a row without a better result, or one above ``worst``, the
            best values are taken again with a quarter of the rate; None: never. So they are after
            a loss that is not finite.
        retreats: how often that may be; the time after, the run ends.
    """

    parameters: Sequence[Tensor]
    learn: Callable[[int], Tensor]
    judge: Callable[[], float]
    before: float
    _: KW_ONLY
    steps: int
    every: int
    rate: float
    smallest: float = 0.0
    patience: int | None = None
    worst: float = math.inf
    retreats: int = 0

    def __post_init__(self) -> None:
        self.state = State(self.before, self.before)
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self.best = [p.detach().clone() for p in self.parameters]
        self._moving = [_moving(p.detach()) for p in self.parameters]
        self._begin()

    def _begin(self) -> None:
        self.masters = [singled(p.detach()).clone() for p in self.parameters]
        groups = relative_groups(self.masters, self.rate, self.smallest)
        self.adam = torch.optim.Adam(groups, betas=BETAS)
        self.largest = [group["lr"] for group in self.adam.param_groups]

    def run(self, order: Iterable[int]) -> Iterator[bool]:
        """Take the steps on the batches at these positions; after each, whether it was judged."""
        for position in itertools.islice(order, self.state.done, None):
            if self.state.stopped:
                break
            self._step(position)
            due = self.state.done % self.every == 0 or self.state.done == self.steps
            if due and not self.state.stopped:
                self._look()
            yield due
        write(self.parameters, self.best)

    def _step(self, position: int) -> None:
        state = self.state
        with asking(self.parameters, True), torch.enable_grad():
            loss = self.learn(position)
            gradients = _gradients(loss, self.parameters)
        told = mean_over(mesh_of(self.parameters), loss)
        sizes = [singled(g).norm() for g in gradients if g is not None]
        share = state.scale * share_of_rate(state.done, self.steps)
        state.done += 1
        self.losses.append(float(told))
        if not (sizes and torch.stack([told.float(), *sizes]).isfinite().all()):
            self._retreat()
            return
        for group, lr in zip(self.adam.param_groups, self.largest, strict=True):
            group["lr"] = lr * share
        for master, gradient, kept in zip(self.masters, gradients, self._moving, strict=True):
            moving = gradient if gradient is None or kept is None else gradient * kept
            master.grad = None if moving is None else singled(moving)
        self.adam.step()
        write(self.parameters, self.masters)

    def _look(self) -> None:
        state, reached = self.state, self.judge()
        self.checks.append((state.done, reached))
        if reached < state.best:
            state.best, state.best_step, state.idle = reached, state.done, 0
            self.best = [p.detach().clone() for p in self.parameters]
            return
        state.idle += 1
        worse = self.patience is not None and not reached <= self.worst
        if worse or state.idle == self.patience:
            self._retreat()

    def _retreat(self) -> None:
        state = self.state
        if state.retreats == self.retreats:
            state.stopped = True
            return
        write(self.parameters, self.best)
        self._begin()
        state.scale, state.idle, state.retreats = state.scale / 4, 0, state.retreats + 1

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on from here, tensors whole: all processes have to ask."""
        known = {
            "state": asdict(self.state),
            "losses": self.losses,
            "checks": self.checks,
            "masters": self.masters,
            "adam": self.adam.state_dict(),
            "largest": self.largest,
            "best": self.best,
        }
        return pytree.tree_map_only(Tensor, whole, known)

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.state = State(**found["state"])
        self.losses, self.checks = list(found["losses"]), [(k, x) for k, x in found["checks"]]
        write(self.masters, self._parts(found["masters"]))
        adam = found["adam"]
        for place, held in adam["state"].items():
            like = self.masters[place]
            held.update({k: split_as(v, like) for k, v in held.items() if v.shape == like.shape})
        self.adam.load_state_dict(adam)
        self.largest = list(found["largest"])
        write(self.best, self._parts(found["best"]))
        write(self.parameters, self.masters)

    def _parts(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [split_as(v, like) for v, like in zip(values, self.masters, strict=True)]


def _moving(parameter: Tensor) -> Tensor | None:
    """Where a matrix is not zero, for zeros are meant: rows of padding, what was pruned.

    None: everywhere. A matrix of nothing but zeros is one that is still to be learnt.
    """
    entries = parameter != 0
    return None if parameter.dim() < 2 or entries.all() or not entries.any() else entries


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """What parameters get; where they are sharded FSDP2 sums it up as ``.grad``, and only there."""
    if not any(map(is_sharded, parameters)):
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        loss.backward()
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


@contextmanager
def asking(parameters: Sequence[Tensor], whether: bool) -> Iterator[None]:
    """Parameters ask for gradients, or do not, whatever they do outside."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(whether)
    try:
        yield
    finally:
        for p, asked in zip(parameters, before, strict=True):
            p.requires_grad_(asked)


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters, in the parameters' dtype."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def rounds(count: int, steps: int, seed: int = 0) -> Iterator[int]:
    """Positions of the batches to take: every one in turn, in an order of its own each time."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for position in torch.randperm(count, generator=generator).tolist():
            if done == steps:
                return
            yield position
            done += 1
