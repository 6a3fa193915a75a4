"""Experts whose rows of input are sorted by expert: grouped products, split as BTP splits others.

A token's part of the residual stream goes to its experts; first factors give partial products of
rank r, which are summed, and second ones this rank's part of their outputs. The router's product
is summed as a first factor's is. Of dense experts the hidden units are summed, each for the rank
that goes on with it, and then what they give to the stream.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.distributed.matrices import COLUMNS, ROWS, Matrix, Put, matrices_in
from tensorize.distributed.ranks import Ranks, fanned, scattered, summed
from tensorize.weight.cores import cores_name
from tensorize.weight.products import grouped


class Stack:
    """A matrix for every expert: (experts, outputs, inputs), dense or as two factors.

    ``opens``: its outputs are hidden units, first all gates and then what these are for; else its
    inputs are hidden units.
    """

    def __init__(self, experts: nn.Module, name: str, ranks: Ranks, *, opens: bool) -> None:
        self.opens = opens
        cores = experts._modules.get(cores_name(name))
        if cores is None:
            self.first, self.last = None, Matrix(experts, name, stacked=True)
        else:
            self.first, self.last = matrices_in(cores, ranks)

    def place(self, put: Put) -> None:
        """Split it. All ranks hold a second factor whose rows are two blocks: DCP knows no parts of
        both in one tensor."""
        if self.first is None:
            self.last.place(put, COLUMNS)
            return
        self.first.place(put, COLUMNS)
        self.last.place(put, None if self.opens else ROWS)

    def __call__(self, x: Tensor, offsets: Tensor, ranks: Ranks) -> Tensor:
        """Rows sorted by expert, up to its offset, times the expert's matrix: this rank's part of
        the output, and of a dense one that does not open a term of the sum."""
        if self.first is not None:
            narrow = fanned(summed(grouped(x, self.first().mT, offsets), ranks), ranks)
            last = self.last()
            if self.opens:
                halves = fanned(last, ranks).unflatten(1, (2, -1))
                last = halves[:, :, ranks.part(halves.shape[2])].flatten(1, 2)
            return grouped(narrow, last.mT, offsets)
        y = grouped(x, self.last().mT, offsets)
        if not self.opens:
            return y
        by_rank = y.unflatten(-1, (2, ranks.count, -1)).transpose(-3, -2)
        return scattered(by_rank.flatten(-3), ranks)


def router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and weights and numbers of the experts that are chosen, on all ranks."""
    x = x.reshape(-1, x.shape[-1])
    if self.first_matrix is None:
        logits = summed(F.linear(x, self.last()), self.ranks)
    else:
        logits = F.linear(summed(F.linear(x, self.first_matrix()), self.ranks), self.last())
    chances, experts = torch.softmax(logits.float(), -1).topk(self.top_k, -1)
    return logits, chances / chances.sum(-1, keepdim=True), experts


def experts(self: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token's experts, weighed: x (tokens, d / ranks), the others (tokens, k)."""
    sorted_experts, order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(sorted_experts, minlength=self.num_experts)
    offsets, tokens = counts.cumsum(0).to(torch.int32), order // chosen.shape[-1]
    gate, up = self.opening(x[tokens], offsets, self.ranks).chunk(2, -1)
    y = self.closing(self.act_fn(gate) * up, offsets, self.ranks)
    y = y * fanned(weights, self.ranks).flatten()[order].unsqueeze(-1)
    out = y.new_zeros(len(x), y.shape[-1]).index_add(0, tokens, y).to(x.dtype)
    return scattered(out, self.ranks) if self.closing.first is None else out
