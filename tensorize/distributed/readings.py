"""Linears that read one tensor: one product and one reduction for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.distributed.guarding import PartOfSum, summed_product
from tensorize.distributed.layers import gained, scale_of
from tensorize.distributed.matrices import Matrix
from tensorize.distributed.ranks import Ranks, fanned, gathered, reduced_product, summed


class OneReading:
    """What the readers of one tensor need of it, computed when the first of them asks.

    The tensor is split over the ranks. First factors side by side make one product, of which one
    reduction gives all ranks r numbers a row; a first factor that readers share is there once. An
    RMSNorm before them is applied to that: its gain to what comes in, its statistic, which goes
    along in the same reduction, to what comes out. Dense readers get the tensor itself, whole.

    Args:
        ranks: among which it is split.
        firsts: the first factor of each linear that reads it; None of a dense one.
        norm: the RMSNorm that hands the tensor on; None: there is none, or it is applied already.
    """

    def __init__(
        self, ranks: Ranks, firsts: Sequence[Matrix | None], norm: nn.Module | None = None
    ) -> None:
        self.ranks, self.norm = ranks, norm
        self.firsts = [first for first in firsts if first is not None]
        self.count = len(firsts)
        self.checks: dict[int, PartOfSum] = {}
        self._last: Any = None

    def __call__(self, reader: Any, x: Tensor) -> Tensor:
        last = self._last
        if last is None or last[0]() is not x:
            last = self._last = [weakref.ref(x), *self._computed(x), self.count]
        _, narrow, whole, _ = last
        last[-1] -= 1
        if not last[-1]:
            self._last = None  # nothing is kept alive once all have it
        first = reader.first_matrix
        return whole if first is None else narrow[id(first.parameter)]

    def _computed(self, x: Tensor) -> tuple[dict[int, Tensor], Tensor | None]:
        """The product of each first factor by its identity, and the whole tensor."""
        firsts = {id(first.parameter): first for first in self.firsts}
        part, squares = (x, None) if self.norm is None else gained(self.norm, x)
        narrow: dict[int, Tensor] = {}
        if firsts:
            part, *weights = _in_compute_dtype(part, *(first() for first in firsts.values()))
            orders = [first.order() for first in firsts.values()]
            if not any(map(len, orders)):
                orders = []
            checks = [self.checks.get(key) for key in firsts]
            if None in checks or torch.compiler.is_compiling():
                how = self.ranks.group, self.ranks.this
                product, squares = reduced_product(part, weights, orders, squares, *how)
            else:
                product, squares = summed_product(checks, part, weights, orders, squares)
            if self.norm is not None:
                product = (product * scale_of(self.norm, squares)).to(product.dtype)
            parts = fanned(product, self.ranks).split([len(w) for w in weights], -1)
            narrow = dict(zip(firsts, parts, strict=True))
        elif squares is not None:
            squares = summed(squares, self.ranks)
        if len(self.firsts) == self.count:
            return narrow, None
        whole = gathered(part, self.ranks, partial=True)
        if self.norm is not None:
            assert squares is not None
            whole = (whole * scale_of(self.norm, fanned(squares, self.ranks))).to(whole.dtype)
        return narrow, whole

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}


def _in_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of a product's operands: it does not know this product."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
