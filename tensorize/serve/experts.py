"""Stacks of experts as an engine runs them: every expert multiplies the rows that it is given.

Shapes: E experts, T rows of k choices each, N columns and M rows of an expert's weight, R its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec

STACKS = UP, DOWN = "gate_up_proj", "down_proj"
"""What transformers calls the two stacks of a layer: gates above the rest, and the way back."""


@dataclass(frozen=True)
class Stack:
    """y = last (first x) of every expert, or y = last x where ``first`` is None.

    ``last``: (E, M, R), or (E, M, N); ``first``: (E, R, N).
    """

    last: Tensor
    first: Tensor | None = None

    @classmethod
    def of(cls, spec: Spec, held: Sequence[Tensor], dtype: torch.dtype) -> Stack:
        """What a checkpoint holds of a stack: cores, and then indices, as numbers.

        Low rank that stores no identity gets it back, which changes no number.
        """
        last, *firsts = (core.to(dtype) for core in format_of(spec).computed(spec, held))
        return cls(last, *firsts)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.last] if self.first is None else [self.last, self.first]

    def on_rank(self, rows: Sequence[slice], columns: slice) -> Stack:
        """The part of one rank of several: of the rows of the weights, or of their columns."""
        last = torch.cat([self.last[:, part] for part in rows], 1)
        if self.first is None:
            return Stack(last[..., columns].contiguous())
        return Stack(last, self.first[..., columns].contiguous())

    def multiply(self, x: Tensor, expert: int) -> Tensor:
        """x Wᵀ of one of them."""
        narrow = x if self.first is None else F.linear(x, self.first[expert])
        return F.linear(narrow, self.last[expert])


def mixed(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    up: Stack,
    down: Stack,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Σ share · down(activate(up(x))) over the experts that every row has chosen: (T, M).

    Args:
        shares: (T, k), what of an expert's output a row gets.
        chosen: (T, k), the numbers of the experts.
        activate: (rows, outputs of ``up``) → (rows, inputs of ``down``).
    """
    y = torch.zeros_like(x)
    k = chosen.shape[1]
    for expert in chosen.unique().tolist():
        (places,) = torch.where(chosen.flatten() == expert)
        rows = places // k
        own = down.multiply(activate(up.multiply(x[rows], expert)), expert)
        y.index_add_(0, rows, own * shares.flatten()[places, None].to(own.dtype))
    return y
