"""Low rank on a GPU: what is ideal, the dense layer, two library matmuls, and kernels.

    python -m benchmarks.gpu            # one GPU, under 8 minutes; --smoke checks arguments only

Rooflines are measured first (copy, matmul), by the same clock as everything after. Buffers rotate
through more memory than the cache holds, data are random, and every result is compared with the
float64 product of the same numbers. Calls are timed inside CUDA graphs, but for those that say
eager. Ideal: the larger of FLOPs at the measured matmul rate and bytes at the measured copy rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import keep
from tensorize.codegen import autotune, launch, tiles, triton_source
from tensorize.codegen.triton_work import NotCovered
from tensorize.ir import TTSpec
from tensorize.work import Epilogue, Work

SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096))
RANKS = (64, 128, 256, 512, 1024)
TOKENS = (1, 16, 256, 4096, 32768)
DTYPE = torch.bfloat16
ROTATED = 256 << 20
"""Bytes that the copies of a cell's weights take together, at least: five times an L2 cache."""
MOST_COPIES = 64
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


def grid(smoke: bool) -> Iterator[Cell]:
    """Every cell that makes sense: those most looked at first."""
    for m, n in SHAPES[: 1 if smoke else None]:
        for rank in RANKS[: 1 if smoke else None]:
            for tokens in TOKENS[: 2 if smoke else None]:
                yield Cell(m, n, rank, tokens)


# ------------------------------------------------------------------------------------ the clock


class Clock:
    """Microseconds of calls on rotated operands."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def graph(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, from a CUDA graph of them all: no launch is paid twice."""
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
        return self._median(graph.replay) / len(calls)

    def eager(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, as Python makes it."""

        def every() -> None:
            for call in calls:
                call()

        every()
        return self._median(every) / len(calls)

    def _median(self, call: Callable[[], object]) -> float:
        samples = []
        call()
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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


def roof(clock: Clock) -> Roof:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    matmul = clock.graph([lambda: a @ b] * 4)
    source = torch.randn(1 << 28, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    copy = clock.graph([lambda: target.copy_(source)] * 4)
    return Roof(2 * 8192**3 / (1e-6 * matmul), 2 * source.nbytes / (1e-6 * copy))


# ---------------------------------------------------------------------------------- the grid


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE) / shape[-1] ** 0.5


def copies(nbytes: int, tokens: int = 1) -> int:
    """How many operands are rotated, so that none is in the cache when it is used again."""
    if tokens >= 4096:
        return 4  # what goes through x and y alone is more than a cache holds
    return max(4, min(MOST_COPIES, ROTATED // max(nbytes, 1)))


def check(y: Tensor, wanted: Tensor) -> float:
    """Relative error on some rows, against float64."""
    few = y[: len(wanted)].double()
    error = float((few - wanted).norm() / wanted.norm())
    if not error < ERROR:
        raise AssertionError(f"wrong: a relative error of {error:.3g}")
    return error


def exact(x: Tensor, *weights: Tensor) -> Tensor:
    """x W₁ᵀ W₂ᵀ … of some rows, in float64."""
    y = x[:64].double()
    for weight in weights:
        y = y @ weight.double().t()
    return y


def dense_layer(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def two_matmuls(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.linear(F.linear(x, first), second)


def measure(cell: Cell, clock: Clock, ceiling: Roof) -> dict[str, Any]:
    """Times of one cell in microseconds, and errors of what was timed."""
    count = copies(2 * cell.rank * (cell.m + cell.n), cell.tokens)
    xs = [draw(cell.tokens, cell.n) for _ in range(min(count, 4))]
    pairs = [
        (xs[k % len(xs)], draw(cell.rank, cell.n), draw(cell.m, cell.rank)) for k in range(count)
    ]
    weights = [draw(cell.m, cell.n) for _ in range(min(copies(2 * cell.m * cell.n), 8))]
    dense = [partial(dense_layer, xs[k % len(xs)], w) for k, w in enumerate(weights)]
    y = torch.empty(cell.tokens, cell.m, device="cuda", dtype=DTYPE)
    found: dict[str, Any] = {
        "ideal": ceiling.ideal(cell.flops, cell.bytes),
        "dense": clock.graph(dense),
        "dense eager": clock.eager(dense),
        "two matmuls": clock.graph([partial(two_matmuls, *pair) for pair in pairs]),
    }
    work = Work((TTSpec.low_rank(cell.m, cell.n, cell.rank),))
    x, first, second = pairs[0]
    best: tuple[float, autotune.Choice] | None = None
    try:
        for choice in autotune.candidates(work, DTYPE, cell.tokens):
            source = autotune.emit(work, choice)
            y.fill_(float("nan"))
            launch.run(source, x, second, first, y)
            error = check(y, exact(x, first, second))
            took = clock.graph([partial(launch.run, source, a, c, b, y) for a, b, c in pairs])
            if best is None or took < best[0]:
                best = took, choice
                found |= {"kernel": took, "family": choice.family, "error": error}
    except NotCovered:
        pass
    library = found["two matmuls"]
    found["ours"] = min(library, found.get("kernel", library))
    found["winner"] = "two matmuls" if found["ours"] == library else found["family"]
    if best is not None:
        choice = replace(best[1], ratio=best[0] / library)
        autotune.keep(work, DTYPE, autotune.bucket(cell.tokens), "cuda", choice)
    return found


# ------------------------------------------------------------------------------ fused projections


def gated(clock: Clock, rank: int, tokens: int) -> dict[str, float]:
    """silu(gate) · up of a 7B model: one launch, four matmuls, and those with the product."""
    work = Work(
        (TTSpec.low_rank(11008, 4096, rank),) * 2,
        gated=True,
        epilogue=Epilogue(activation="silu"),
    )
    x, a, b = draw(tokens, 4096), draw(rank, 4096), draw(rank, 4096)
    u, v = draw(11008, rank), draw(11008, rank)
    y = torch.empty(tokens, 11008, device="cuda", dtype=DTYPE)
    few = tokens <= tiles.FEW_ROWS
    cut = tiles.default_decode(work, DTYPE, tokens) if few else tiles.default(work, DTYPE)
    source = (triton_source.decode if few else triton_source.forward)(work, cut)

    def four() -> tuple[Tensor, Tensor]:
        return two_matmuls(x, a, u), two_matmuls(x, b, v)

    def product() -> Tensor:
        gate, up = four()
        return F.silu(gate) * up

    def one() -> None:
        launch.run(source, x, u, a, v, b, y)

    one()
    error = check(y, F.silu(exact(x, a, u)) * exact(x, b, v))
    return {
        "four matmuls": clock.graph([four] * 4),
        "four matmuls and a product": clock.graph([product] * 4),
        "one launch": clock.graph([one] * 4),
        "error": error,
    }


def projections(clock: Clock, tokens: int) -> dict[str, float]:
    """q, k, v of one input: one launch, and three pairs of matmuls."""
    work = Work(tuple(TTSpec.low_rank(m, 4096, 128) for m in (4096, 1024, 1024)))
    x, cores = draw(tokens, 4096), [[draw(*s) for s in spec.core_shapes] for spec in work.specs]
    ys = [torch.empty(tokens, m, device="cuda", dtype=DTYPE) for m in work.outs]
    source = triton_source.decode(work, tiles.default_decode(work, DTYPE, tokens))

    def three() -> list[Tensor]:
        return [two_matmuls(x, first, second) for second, first in cores]

    def one() -> None:
        launch.run(source, x, *(core for pair in cores for core in pair), *ys)

    one()
    error = max(check(y, exact(x, c[1], c[0])) for y, c in zip(ys, cores, strict=True))
    return {
        "six matmuls": clock.graph([three] * 8),
        "one launch": clock.graph([one] * 8),
        "error": error,
    }


def fused(clock: Clock) -> dict[str, Any]:
    """Several weights of one input in one launch."""
    found: dict[str, Any] = {}
    for rank, tokens in ((128, 4096), (128, 1), (256, 4096)):
        found[f"gate·up r{rank} T{tokens}"] = gated(clock, rank, tokens)
    for tokens in (1, 16):
        found[f"q, k, v r128 T{tokens}"] = projections(clock, tokens)
    return found


def linears(clock: Clock, share: float, tokens: int) -> dict[str, float]:
    """All linears of a Llama-7B layer: prefill and decode without attention."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    ranks = [64 * max(1, round(share * m * n / (m + n) / 64)) for m, n in shapes]
    dense = [partial(dense_layer, draw(tokens, n), draw(m, n)) for m, n in shapes]
    library, ours = [], []
    for (m, n), rank in zip(shapes, ranks, strict=True):
        x, first, second = draw(tokens, n), draw(rank, n), draw(m, rank)
        y = torch.empty(tokens, m, device="cuda", dtype=DTYPE)
        library.append(partial(two_matmuls, x, first, second))
        try:
            work = Work((TTSpec.low_rank(m, n, rank),))
            source = autotune.source(work, DTYPE, tokens, "cuda")
            ours.append(partial(launch.run, source, x, second, first, y))
        except NotCovered:
            ours.append(library[-1])
    calls = {"dense": dense, "two matmuls": library, "kernels": ours}
    return {name: len(shapes) * clock.graph(each) for name, each in calls.items()}


def training(clock: Clock) -> dict[str, Any]:
    """Forward and backward of one layer, eager: torch's own against the kernels'."""
    from tensorize.codegen.triton_ops import contractions

    found: dict[str, Any] = {}
    for rank in (128, 512):
        spec = TTSpec.low_rank(4096, 4096, rank)
        x = draw(4096, 4096).requires_grad_()
        cores = [draw(*shape).requires_grad_() for shape in spec.core_shapes]
        run = contractions(spec)["columns"]
        dy = draw(4096, 4096)

        def library(x: Tensor = x, cores: list[Tensor] = cores, dy: Tensor = dy) -> None:
            y = F.linear(F.linear(x, cores[1]), cores[0])
            torch.autograd.grad(y, (x, *cores), dy)

        def kernels(x: Tensor = x, cores: list[Tensor] = cores, dy: Tensor = dy, run=run) -> None:
            torch.autograd.grad(run(x, cores), (x, *cores), dy)

        found[f"forward and backward r{rank} T4096"] = {
            "two matmuls": clock.eager([library] * 4),
            "kernels": clock.eager([kernels] * 4),
        }
    return found


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
    parser.add_argument("--smoke", action="store_true", help="say what would be timed, and stop")
    options = parser.parse_args(arguments)
    if options.smoke:
        print(f"{len(list(grid(False)))} cells; first {', '.join(map(str, grid(True)))}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU on this machine; --smoke checks the arguments")
    torch.manual_seed(0)
    begun, clock = time.monotonic(), Clock(options.rounds)
    ceiling = roof(clock)
    print(f"{ceiling.flops / 1e12:.0f} TFLOP/s, {ceiling.bandwidth / 1e12:.2f} TB/s", flush=True)
    results: dict[str, Any] = {"roof": vars(ceiling), "fused": fused(clock)}
    results["training"] = training(clock)
    results["layer"] = {
        f"linears of a 7B layer at {share} T{tokens}": linears(clock, share, tokens)
        for share in (0.25, 0.1)
        for tokens in (1, 4096)
    }
    cells: dict[str, dict[str, Any]] = {}
    skipped = []
    # Every third cell of the grid first, so that a run that ends early has seen all of it.
    everything = list(grid(False))
    for cell in (c for start in range(3) for c in everything[start::3]):
        if time.monotonic() - begun > SECONDS:
            skipped.append(str(cell))
            continue
        cells[str(cell)] = measure(cell, clock, ceiling)
        torch.cuda.empty_cache()
    results |= {"cells": cells, "skipped": skipped}
    results["seconds"] = time.monotonic() - begun
    more = (results[kind].items() for kind in ("fused", "training", "layer"))
    for name, figures in (item for items in more for item in items):
        print(name, ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
    print(f"kept in {keep(options.name, results)}; {len(skipped)} cells skipped for time")
    print(table(cells))


if __name__ == "__main__":
    main()
