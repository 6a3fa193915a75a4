"""What holds a processor back beside its products: a decoder's block, run and taken apart.

Eager operations pass over memory many times, attention is slower than a product, and starting an
operation takes longer than a small one. The three are found in this order: the start from a block
that is next to nothing, attention by itself, passes from what a usual block takes beside its
products. The block's shapes are none that a plan is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from tensorize.distributed.strategy.cluster import Cluster
from tensorize.distributed.strategy.seconds import (
    AROUND,
    BACK,
    first_seconds,
    other_seconds,
    starts,
)
from tensorize.distributed.strategy.strategy import PLAIN
from tensorize.distributed.strategy.workload import Workload

Wall = Callable[[Callable[[], object]], float]
_PASSES = 3
"""Forward, and twice as much backward."""


@dataclass(frozen=True)
class Eager:
    """As the fields of ``Cluster``."""

    attention: float
    eager: float
    start: float


@dataclass(frozen=True)
class _Shape:
    width: int
    inner: int
    heads: int
    sequences: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens


_BLOCKS = 4
_NOTHING = _Shape(32, 64, 4, 1, 8)
_USUAL = _Shape(128, 352, 2, 8, 128)
"""Narrow: most of what it takes is no product."""
_HEADS, _TOKENS, _HEAD = 4, 768, 64


def eager_figures(cluster: Cluster, wall: Wall) -> Eager:
    """The three figures of this process; ``wall`` takes the seconds of a call."""
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()))
    start = _block_seconds(_NOTHING, mesh, wall) / ((1 + BACK) * _starts(_NOTHING))
    attention = _attention(cluster, wall)
    known = replace(cluster, attention=attention, start=start)
    layer = _workload(_USUAL).layers[0]
    how = PLAIN, 1, _USUAL.rows
    beside = other_seconds(replace(known, eager=0.0), layer, *how, _USUAL.tokens)
    passes = other_seconds(replace(known, eager=1.0), layer, *how, _USUAL.tokens) - beside
    products = first_seconds(known, layer, *how) + beside
    begun = (1 + BACK) * _starts(_USUAL) * start
    left = _block_seconds(_USUAL, mesh, wall) - begun - _PASSES * products
    return Eager(attention, max(left / (_PASSES * passes), 0.0), start)


def _workload(shape: _Shape) -> Workload:
    return Workload.decoder(shape.width, shape.inner, 1, shape.heads, 1)


def _starts(shape: _Shape) -> int:
    return starts(_workload(shape).layers[0], PLAIN, 1) - AROUND


def _attention(cluster: Cluster, wall: Wall) -> float:
    """The share of a product's speed that attention has."""
    shape = 1, _HEADS, _TOKENS, _HEAD
    parts = q, k, v = tuple(torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)

    def step() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, parts, gradient)

    flops = _PASSES * 2 * 2 * _TOKENS * (_TOKENS / 2) * _HEADS * _HEAD
    return flops / (cluster.peak * cluster.share(128) * wall(step))


def _block_seconds(shape: _Shape, mesh: DeviceMesh, wall: Wall) -> float:
    """Seconds of a forward and a backward pass of one of some blocks.

    What several keep for the backward pass is more than a processor's caches hold, as in a model.
    """
    block = nn.Sequential(*(_Block(shape, mesh) for _ in range(_BLOCKS)))
    x = torch.randn(shape.sequences, shape.tokens, shape.width, requires_grad=True)
    gradient = torch.randn(x.shape)

    def step() -> None:
        block(x).backward(gradient)
        block.zero_grad()
        x.grad = None

    return wall(step) / _BLOCKS


class _Linear(nn.Module):
    """A weight as parallel models hold it: of each process the part that is its own."""

    def __init__(self, inputs: int, outputs: int, mesh: DeviceMesh) -> None:
        super().__init__()
        own = torch.randn(outputs, inputs) * inputs**-0.5
        held = DTensor.from_local(own, mesh, [Replicate()], run_check=False)
        self.weight = nn.Parameter(held)

    def forward(self, x: Tensor) -> Tensor:
        held = self.weight
        assert isinstance(held, DTensor)
        return F.linear(x, held.to_local())


class _Block(nn.Module):
    """A decoder's block in eager operations, as models of transformers write it."""

    def __init__(self, shape: _Shape, mesh: DeviceMesh) -> None:
        super().__init__()
        width, inner, self.heads = shape.width, shape.inner, shape.heads
        self.gains = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (_Linear(width, width, mesh) for _ in range(4))
        self.gate, self.up = (_Linear(width, inner, mesh) for _ in range(2))
        self.down = _Linear(inner, width, mesh)
        angles = torch.rand(shape.tokens, width // shape.heads)
        self.turns = angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        y = self._normed(x, 0)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value)
        )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self._normed(x, 1)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _normed(self, x: Tensor, place: int) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.gains[place] * wide.to(x.dtype)

    def _turned(self, x: Tensor) -> Tensor:
        cos, sin = self.turns
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin
