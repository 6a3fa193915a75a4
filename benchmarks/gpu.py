"""Low rank on a GPU: what is ideal, the dense layer, two library matmuls, and kernels.

    python -m benchmarks.gpu            # one GPU, under 8 minutes
    python -m benchmarks.gpu --smoke    # every step at a tiny size, without a GPU interpreted

Rooflines are measured first (copy, matmul), by the same clock as everything after. Buffers rotate
through more memory than the cache holds, data are random, and every result is compared with the
float64 product of the same numbers. Calls are timed inside CUDA graphs, but for those that say
eager. Ideal: the larger of FLOPs at the measured matmul rate and bytes at the measured copy rate.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from tensorize.codegen.device import autotune, launch, operations
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work
from tensorize.weight.install import install
from tensorize.weight.whole_model import use_kernels


@dataclass(frozen=True)
class Sizes:
    """What is measured: weights (m, n), ranks and rows of the grid; and the shape of a layer.

    ``wide`` is what the roofline's matmul and copy are of, ``fused`` are ranks and tokens of gate
    and up, ``shares`` what the layer keeps of its weights, ``context`` what its decode step sees.
    """

    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    wide: int
    hidden: int
    inner: int
    heads: int
    context: int
    fused: tuple[tuple[int, int], ...]
    trained: tuple[int, ...]
    shares: tuple[float, ...]


FULL = Sizes(
    shapes=((4096, 4096), (8192, 8192), (11008, 4096)),
    ranks=(64, 128, 256, 512, 1024),
    tokens=(1, 16, 256, 4096, 32768),
    wide=8192,
    hidden=4096,
    inner=11008,
    heads=32,
    context=4096,
    fused=((128, 4096), (128, 1), (256, 4096)),
    trained=(64, 128, 256, 512),
    shares=(0.25, 0.1),
)
SMOKE = Sizes(
    shapes=((64, 64),),
    ranks=(16,),
    tokens=(1, 20),
    wide=64,
    hidden=64,
    inner=96,
    heads=2,
    context=8,
    fused=((16, 20), (16, 1)),
    trained=(16,),
    shares=(0.5,),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
ROTATED = 256 << 20
"""Bytes that the copies of a cell's weights take together, at least: five times an L2 cache."""
MOST_COPIES = 256
STACKED, FEW = 4, 16
"""Layers that are timed one after the other; tokens up to which nobody trains."""
AHEAD = 300_000
"""Cycles of the GPU that a graph has to be launched in."""
ERROR = 2e-2
"""Relative error (a norm) that is taken for wrong: about five roundings of bfloat16."""
SECONDS = 440
"""No further cell is begun after that."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a weight (m, n) of rank r and the rows of x."""

    m: int
    n: int
    rank: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n} r{self.rank} T{self.tokens}"

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.rank * (self.m + self.n)

    @property
    def bytes(self) -> int:
        return 2 * (self.rank + self.tokens) * (self.m + self.n)


def grid(sizes: Sizes) -> Iterator[Cell]:
    """Every cell that makes sense: those most looked at first."""
    for m, n in sizes.shapes:
        for rank in sizes.ranks:
            for tokens in sizes.tokens:
                yield Cell(m, n, rank, tokens)


# ------------------------------------------------------------------------------------ the clock


class Clock:
    """Microseconds of calls on rotated operands."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def graph(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, from a CUDA graph of them all: no launch is paid twice."""
        if DEVICE == "cpu":
            return self.eager(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self._median(graph.replay, ahead=True) / len(calls)

    def eager(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, as Python makes it."""

        def every() -> None:
            for call in calls:
                call()

        every()
        return self._median(every) / len(calls)

    def _median(self, call: Callable[[], object], *, ahead: bool = False) -> float:
        samples = []
        call()
        for _ in range(self.rounds):
            if DEVICE == "cpu":
                began = time.perf_counter()
                call()
                samples.append(1e6 * (time.perf_counter() - began))
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if ahead:
                torch.cuda._sleep(AHEAD)  # so that the launch is there before the start is
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            samples.append(1e3 * start.elapsed_time(end))
        return statistics.median(samples)


@dataclass(frozen=True)
class Roof:
    """What was measured of the machine: FLOP/s of a large matmul, bytes/s of a large copy."""

    flops: float
    bandwidth: float

    def ideal(self, flops: float, nbytes: float) -> float:
        """Microseconds."""
        return 1e6 * max(flops / self.flops, nbytes / self.bandwidth)


def roof(clock: Clock, wide: int) -> Roof:
    a, b = (torch.randn(wide, wide, device=DEVICE, dtype=DTYPE) for _ in range(2))
    matmul = clock.graph([lambda: a @ b] * 4)
    source = torch.randn(4 * wide * wide, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    copy = clock.graph([lambda: target.copy_(source)] * 4)
    return Roof(2 * wide**3 / (1e-6 * matmul), 2 * source.nbytes / (1e-6 * copy))


# ---------------------------------------------------------------------------------- the grid


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE) / shape[-1] ** 0.5


def copies(nbytes: int, tokens: int = 1) -> int:
    """How many operands are rotated, so that none is in the cache when it is used again."""
    if DEVICE == "cpu":
        return 4  # the interpreter is slow
    if tokens >= 4096:
        return 4  # what goes through x and y alone is more than a cache holds
    return max(4, min(MOST_COPIES, ROTATED // max(nbytes, 1)))


def check(y: Tensor, wanted: Tensor, most: float = ERROR) -> float:
    """Relative error on some rows, against float64."""
    few = y[: len(wanted)].double()
    error = float((few - wanted).norm() / wanted.norm())
    if not error < most:
        raise AssertionError(f"wrong: a relative error of {error:.3g}")
    return error


def exact(x: Tensor, *weights: Tensor) -> Tensor:
    """x W₁ᵀ W₂ᵀ … of some rows, in float64."""
    y = x[:64].double()
    for factor in weights:
        y = y @ factor.double().t()
    return y


def dense_layer(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def two_matmuls(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.linear(F.linear(x, first), second)


@lru_cache
def dense(m: int, n: int, tokens: int, clock: Clock) -> dict[str, float]:
    """The dense layer, which ranks have in common: in a CUDA graph, eager, compiled by torch."""
    xs = [draw(tokens, n) for _ in range(4)]
    weights = [draw(m, n) for _ in range(min(copies(2 * m * n), 8))]
    calls = [partial(dense_layer, xs[k % 4], w) for k, w in enumerate(weights)]
    torch._dynamo.reset()
    faster = torch.compile(dense_layer, dynamic=False)
    compiled = [partial(faster, xs[k % 4], w) for k, w in enumerate(weights)]
    return {
        "dense": clock.graph(calls),
        "dense eager": clock.eager(calls),
        "dense compiled": clock.graph(compiled),
    }


@dataclass(frozen=True)
class Fastest:
    """The choice that took the least time, in microseconds, and its error."""

    choice: autotune.Choice
    took: float
    error: float


def fastest(
    clock: Clock,
    work: Work,
    tokens: int,
    launched: Callable[..., None],
    operands: Sequence[tuple[Tensor, ...]],
    right: Callable[..., float],
    outputs: Sequence[Tensor],
) -> Fastest | None:
    """Of the choices that are tried; ``right`` checks what the first operands gave.

    Raises:
        NotCovered: there is none.
    """
    best: Fastest | None = None
    for choice in autotune.candidates(work, DTYPE, tokens):
        source = autotune.emit(work, choice)
        for output in outputs:
            output.fill_(float("nan"))
        try:
            launched(source, *operands[0])
        except launch.DoesNotFit:
            continue
        error = right(*operands[0])
        took = clock.graph([partial(launched, source, *held) for held in operands])
        if best is None or took < best.took:
            best = Fastest(choice, took, error)
    return best


def measure(cell: Cell, clock: Clock, ceiling: Roof) -> dict[str, Any]:
    """Times of one cell in microseconds, and errors of what was timed."""
    count = copies(2 * cell.rank * (cell.m + cell.n), cell.tokens)
    xs = [draw(cell.tokens, cell.n) for _ in range(min(count, 4))]
    pairs = [
        (xs[k % len(xs)], draw(cell.rank, cell.n), draw(cell.m, cell.rank)) for k in range(count)
    ]
    y = torch.empty(cell.tokens, cell.m, device=DEVICE, dtype=DTYPE)
    found: dict[str, Any] = {
        "ideal": ceiling.ideal(cell.flops, cell.bytes),
        **dense(cell.m, cell.n, cell.tokens, clock),
        "two matmuls": clock.graph([partial(two_matmuls, *pair) for pair in pairs]),
    }
    work = Work((TTSpec.low_rank(cell.m, cell.n, cell.rank),))

    def launched(source: Source, x: Tensor, first: Tensor, second: Tensor) -> None:
        launch.run(source, x, second, first, y)

    def right(x: Tensor, first: Tensor, second: Tensor) -> float:
        return check(y, exact(x, first, second))

    best = None
    with contextlib.suppress(NotCovered):
        best = fastest(clock, work, cell.tokens, launched, pairs, right, [y])
    if best is not None:
        found |= {"kernel": best.took, "family": best.choice.family, "error": best.error}
    library = found["two matmuls"]
    found["ours"] = min(library, found.get("kernel", library))
    found["winner"] = "two matmuls" if found["ours"] == library else found["family"]
    if best is not None and DEVICE != "cpu":
        choice = replace(best.choice, ratio=best.took / library)
        autotune.keep(work, DTYPE, autotune.bucket(cell.tokens), DEVICE, choice)
    return found


# ------------------------------------------------------------------------------ fused projections


def one_launch(best: Fastest | None) -> dict[str, float]:
    return {} if best is None else {"one launch": best.took, "error": best.error}


def gated(clock: Clock, sizes: Sizes, rank: int, tokens: int) -> dict[str, float]:
    """silu(gate) · up of the layer: one launch, four matmuls, and those with the product."""
    into, out = sizes.hidden, sizes.inner
    work = Work(
        (TTSpec.low_rank(out, into, rank),) * 2, gated=True, epilogue=Epilogue(activation="silu")
    )
    count = copies(4 * rank * (into + out), tokens)
    x, y = draw(tokens, into), torch.empty(tokens, out, device=DEVICE, dtype=DTYPE)
    weights = [
        (draw(rank, into), draw(out, rank), draw(rank, into), draw(out, rank)) for _ in range(count)
    ]

    def four(a: Tensor, u: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return two_matmuls(x, a, u), two_matmuls(x, b, v)

    def product(*held: Tensor) -> Tensor:
        gate, up = four(*held)
        return F.silu(gate) * up

    def launched(source: Source, a: Tensor, u: Tensor, b: Tensor, v: Tensor) -> None:
        launch.run(source, x, u, a, v, b, y)

    def right(a: Tensor, u: Tensor, b: Tensor, v: Tensor) -> float:
        return check(y, F.silu(exact(x, a, u)) * exact(x, b, v))

    return {
        "four matmuls": clock.graph([partial(four, *held) for held in weights]),
        "four matmuls and a product": clock.graph([partial(product, *held) for held in weights]),
        **one_launch(fastest(clock, work, tokens, launched, weights, right, [y])),
    }


def projections(clock: Clock, sizes: Sizes, rank: int, tokens: int) -> dict[str, float]:
    """q, k, v of one input: one launch, and three pairs of matmuls."""
    into = sizes.hidden
    work = Work(tuple(TTSpec.low_rank(m, into, rank) for m in (into, into // 4, into // 4)))
    x = draw(tokens, into)
    ys = [torch.empty(tokens, m, device=DEVICE, dtype=DTYPE) for m in work.outs]
    shapes = [shape for spec in work.specs for shape in spec.core_shapes]
    count = copies(2 * sum(a * b for a, b in shapes), tokens)
    cores = [tuple(draw(*shape) for shape in shapes) for _ in range(count)]

    def three(*held: Tensor) -> list[Tensor]:
        return [two_matmuls(x, held[k + 1], held[k]) for k in range(0, len(held), 2)]

    def launched(source: Source, *held: Tensor) -> None:
        launch.run(source, x, *held, *ys)

    def right(*held: Tensor) -> float:
        return max(check(y, exact(x, held[2 * k + 1], held[2 * k])) for k, y in enumerate(ys))

    return {
        "six matmuls": clock.graph([partial(three, *held) for held in cores]),
        **one_launch(fastest(clock, work, tokens, launched, cores, right, ys)),
    }


# ------------------------------------------------------------------------------ a whole layer


class Layer(nn.Module):
    """A decoder layer of Llama's shape: norms, attention over a context, a gated MLP.

    Positions are left out: they cost all variants the same, and next to nothing.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.hidden, sizes.heads
        self.before, self.after = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, sizes.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.inner, width, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (1, T, hidden); keys and values of the context (1, heads, C, hidden / heads)."""
        y = self.before(x)
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        alone = keys.shape[2] == 0  # then later tokens are masked; one more sees all of the context
        k, v = (k, v) if alone else (torch.cat([keys, k], 2), torch.cat([values, v], 2))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=alone)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def compressed(sizes: Sizes, share: float) -> Layer:
    """The layer with random factors in place of its weights."""
    layer = Layer(sizes).to(DEVICE, DTYPE).eval()
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.Linear):
            m, n = child.weight.shape
            rank = 16 * max(1, round(share * m * n / (m + n) / 16))
            cores = [nn.Parameter(draw(m, rank)), nn.Parameter(draw(rank, n))]
            install(layer, [f"{name}.weight"], TTSpec.low_rank(m, n, rank), cores)
    return layer


class Stack(nn.Module):
    """Layers one after the other, so that none finds its weights in a cache."""

    def __init__(self, made: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keys, values)
        return x


@torch.no_grad()
def layers(clock: Clock, sizes: Sizes, share: float, tokens: int, context: int) -> dict[str, float]:
    """A layer dense and compressed: by torch, compiled by torch, and by kernels; one of a stack."""
    head = sizes.hidden // sizes.heads
    x = draw(1, tokens, sizes.hidden)
    past = [draw(1, sizes.heads, context, head) for _ in range(2)]
    dense = Stack([Layer(sizes).to(DEVICE, DTYPE).eval() for _ in range(STACKED)])
    small = Stack([compressed(sizes, share) for _ in range(STACKED)])
    torch._dynamo.reset()
    found: dict[str, float] = {}
    wanted = copy.deepcopy(small).double()(x.double(), *(each.double() for each in past))
    for name, stack in (("dense", dense), ("two matmuls", small)):
        found[name] = clock.graph([partial(stack, x, *past)]) / STACKED
        faster = torch.compile(stack, dynamic=False)
        found[f"{name} compiled"] = clock.graph([partial(faster, x, *past)]) / STACKED
    use_kernels(small, operations.contractions)
    options = {"inner": "eager"}
    kernels = torch.compile(small, backend="tensorize", dynamic=False, options=options)
    # Every layer rounds some ten times, one result after the other.
    found["error"] = check(kernels(x, *past)[0], wanted[0, :64], 4 * ERROR)
    found["kernels"] = clock.graph([partial(kernels, x, *past)]) / STACKED
    return found


def training(cell: Cell, clock: Clock) -> dict[str, float]:
    """Forward and backward of one layer, in CUDA graphs: dense, torch's low rank, and kernels."""
    spec = TTSpec.low_rank(cell.m, cell.n, cell.rank)
    contraction = operations.contractions(spec)["columns"]
    count = copies(2 * cell.rank * (cell.m + cell.n), cell.tokens)
    x, dy = draw(cell.tokens, cell.n).requires_grad_(), draw(cell.tokens, cell.m)
    weights = [draw(cell.m, cell.n).requires_grad_() for _ in range(min(count, 8))]
    pairs = [[draw(*s).requires_grad_() for s in spec.core_shapes] for _ in range(count)]

    def alone(w: Tensor) -> None:
        torch.autograd.grad(F.linear(x, w), (x, w), dy)

    def library(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(two_matmuls(x, right, left), (x, left, right), dy)

    def kernels(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(contraction(x, [left, right]), (x, left, right), dy)

    inputs = [each.detach().double().requires_grad_() for each in (x, *pairs[0])]
    wide, left, right = inputs
    exactly = torch.autograd.grad(two_matmuls(wide, right, left), inputs, dy.double())
    found = zip(kernels(*pairs[0]), exactly, strict=True)
    return {
        "error": max(check(mine, theirs[:64]) for mine, theirs in found),
        "dense": clock.graph([partial(alone, w) for w in weights]),
        "two matmuls": clock.graph([partial(library, *pair) for pair in pairs]),
        "kernels": clock.graph([partial(kernels, *pair) for pair in pairs]),
    }


# --------------------------------------------------------------------------------------- output


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The short table that is printed last."""
    lines = [f"{'cell':>26} {'dense':>9} {'2 matmuls':>9} {'kernel':>9} {'ideal':>9}  winner"]
    for name, cell in cells.items():
        kernel = f"{cell['kernel']:9.1f}" if "kernel" in cell else f"{'–':>9}"
        lines.append(
            f"{name:>26} {cell['dense']:9.1f} {cell['two matmuls']:9.1f} {kernel} "
            f"{cell['ideal']:9.1f}  {cell['winner']}, {cell['dense'] / cell['ours']:.2f}x dense, "
            f"{cell['ideal'] / cell['ours']:.2f} of ideal"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="gpu", help="of the file of results")
    parser.add_argument("--smoke", action="store_true", help="every step at a tiny size; no file")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu":
        if not options.smoke:
            raise SystemExit("no GPU on this machine; --smoke runs every step at a tiny size")
        os.environ["TRITON_INTERPRET"] = "1"

    def kept(results: dict[str, Any]) -> None:
        if not options.smoke:
            keep(options.name, results)

    clock = Clock(1 if options.smoke else options.rounds)
    results = run(SMOKE if options.smoke else FULL, clock, kept)
    counts = f"{len(results['skipped'])} skipped for time, {len(results['failed'])} failed"
    print(f"{counts}, {results['seconds']:.0f} s")
    print(table(results["cells"]))


def run(sizes: Sizes, clock: Clock, kept: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, in the order of what is looked at most, until the time is up.

    What there is goes to ``kept`` after every part, and what failed stands beside it.
    """
    torch.manual_seed(0)
    begun = time.monotonic()
    ceiling = roof(clock, sizes.wide)
    print(f"{ceiling.flops / 1e12:.3g} TFLOP/s, {ceiling.bandwidth / 1e12:.3g} TB/s", flush=True)
    parts: dict[str, Callable[[], dict[str, float]]] = {}
    for rank, tokens in sizes.fused:
        parts[f"gate·up r{rank} T{tokens}"] = partial(gated, clock, sizes, rank, tokens)
    for tokens in (1, 16):
        rank = sizes.fused[0][0]
        parts[f"q, k, v r{rank} T{tokens}"] = partial(projections, clock, sizes, rank, tokens)
    for share in sizes.shares:
        for tokens, past in ((1, sizes.context), (sizes.context, 0)):
            name = f"a layer at {share} T{tokens} after {past}"
            parts[name] = partial(layers, clock, sizes, share, tokens, past)
    # Every third cell of the grid first, so that a run that ends early has seen all of it.
    everything = list(grid(sizes))
    everything = [cell for start in range(3) for cell in everything[start::3]]
    learning = [c for c in everything if c.tokens > FEW and c.rank in sizes.trained]
    kinds: dict[str, Mapping[str, Callable[[], dict[str, Any]]]] = {
        "parts": parts,
        "cells": {str(cell): partial(measure, cell, clock, ceiling) for cell in everything},
        "forward and backward": {str(cell): partial(training, cell, clock) for cell in learning},
    }
    results: dict[str, Any] = {"roof": vars(ceiling), **{kind: {} for kind in kinds}, "failed": {}}
    skipped = []
    for kind, measures in kinds.items():
        for name, call in measures.items():
            if time.monotonic() - begun > SECONDS:
                skipped.append(f"{kind} {name}")
                continue
            try:
                figures = results[kind][name] = call()
            except Exception as error:  # what else there is must not be lost by it
                figures = results["failed"][f"{kind} {name}"] = f"{type(error).__name__}: {error}"
            if kind != "cells" or isinstance(figures, str):
                shown = figures if isinstance(figures, str) else _figures(figures)
                print(kind, name, shown, flush=True)
            torch.cuda.empty_cache()
            kept({**results, "skipped": skipped, "seconds": time.monotonic() - begun})
    return {**results, "skipped": skipped, "seconds": time.monotonic() - begun}


def _figures(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


if __name__ == "__main__":
    main()
