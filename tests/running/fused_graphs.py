"""Small modules, their graphs lowered and fused, and what their launches are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tensorize
from tensorize import TTSpec
from tensorize.codegen.device.triton_env import interpreting
from tensorize.ir.work import Epilogue, Work
from tensorize.passes.lowering.graph import Lowered
from tensorize.running.fuse_graph import fuse
from tensorize.running.in_use import launches


class RMSNorm(nn.Module):
    """As Hugging Face writes it, with ``shift`` as Gemma does; another ``power`` is none."""

    def __init__(self, width: int, shift: float = 0.0, power: int = 2) -> None:
        super().__init__()
        self.weight, self.shift, self.power = nn.Parameter(torch.randn(width)), shift, power

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(self.power).mean(-1, keepdim=True) + 1e-6)
        weight = self.weight + self.shift if self.shift else self.weight
        return weight * x.to(dtype)


class Block(nn.Module):
    """A norm, three weights of one input, and whatever ``behind`` does with them."""

    def __init__(self, behind: Callable[..., Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, x, self.norm(x))


def by_kernels(model: nn.Module, **options: object) -> nn.Module:
    return tensorize.compile(
        model.eval(),
        None,
        example_inputs=(torch.randn(5, 24),),
        formats=options.get("formats", "low_rank"),
        ranks=options.get("ranks", {"*": 6}),
        metric="frobenius",
        refine=None,
        backend="triton",
    )


def lowered(model: nn.Module, *inputs: Tensor, **options: object) -> Lowered:
    """The graph of a model that runs by kernels, after fusing."""
    small = by_kernels(model, **options)
    return traced(small, *inputs)


def traced(small: nn.Module, *inputs: Tensor) -> Lowered:
    torch._dynamo.reset()  # so that these very shapes are seen
    seen: list[Lowered] = []

    def keep(graph: fx.GraphModule, values: list) -> object:
        seen.append(fuse(graph, values, launches()))
        return seen[-1].graph.forward if interpreting() else lambda *_: _stand_in(graph)

    with torch.no_grad():
        torch.compile(small, backend=keep)(*inputs)
    return seen[0]


def _stand_in(graph: fx.GraphModule) -> tuple[Tensor, ...]:
    """Results of the right shapes, where kernels cannot run."""
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    return tuple(torch.zeros(result.meta["example_value"].shape) for result in results)


def fused(model: nn.Module, *inputs: Tensor, **options: object) -> list[str]:
    """What every launch of the graph takes in."""
    return [work.fused for work, _ in lowered(model, *(inputs or (X,)), **options).fused]


X = torch.randn(5, 24)
EAGER = {"inner": "eager"}


def three(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return (m.a(y) + 1).relu() - (m.b(y) + 1).relu() * (m.c(y) + 1)


def swiglu(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + m.c(F.silu(m.a(y)) * m.b(y))


def mlp(m: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + 0.5 * m.b(F.gelu(m.a(y), approximate="tanh"))


PLAIN = Work((TTSpec.low_rank(24, 24, 6),), epilogue=Epilogue(bias=True))
