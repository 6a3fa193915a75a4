"""Low rank with and without what a change of basis can remove: what rounding costs, and time.

    python -m benchmarks.pivot --threads 1

``rounding``: the weights of the trained GPT and Llama of ``examples``, and random ones, cut at
shares of their full rank. For each bound on V', and for columns in groups of two and four: the
largest entry, and the relative error by rounding to bfloat16, over that of plain factors. ``time``:
one layer at the same rank and at the same number of parameters, over the plain form (above 1:
faster); interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep, kept
from benchmarks.timing import interleaved
from examples import gpt, llama
from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric
from tensorize.algebra.pivot import BOUND, pivoted, plain, rounded
from tensorize.ir.spec import TTSpec
from tensorize.weight.install import install

BOUNDS = (2.0, 1.5, 1.2, BOUND, 1.01)
GROUPS = (2, 4)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (2048, 2048))
ROWS = (1, 16, 256, 2048)
PLAIN = Metric(1.0, None, None)


def weights() -> Iterator[tuple[str, Tensor]]:
    """Matrices by name: of trained models, and random ones whose singular values fall slowly."""
    for name, model in (("gpt", gpt.load_pretrained()), ("llama", llama.load_pretrained())):
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2:
                yield f"{name}: {path}", parameter.detach()
    draw = torch.Generator().manual_seed(0)
    for m, n in SHAPES:
        small = min(m, n)
        a, b = (torch.linalg.qr(torch.randn(k, small, generator=draw))[0] for k in (m, n))
        yield f"random {m} x {n}", (a * torch.arange(1, small + 1) ** -0.5) @ b.T


def rounding(weight: Tensor, share: float) -> dict[str, Any]:
    """What bfloat16 costs in each form, relative to the product."""
    rank = max(1, round(share * min(weight.shape)))
    left, right = (factor.double() for factor in best_factors(weight, PLAIN, rank))
    exact = left @ right

    def off(u: Tensor, v: Tensor) -> float:
        return float((u.double() @ v.double() - exact).norm() / exact.norm())

    found: dict[str, Any] = {"plain": off(left.bfloat16(), right.bfloat16())}
    forms = {str(bound): pivoted(left, right, bound) for bound in BOUNDS}
    forms |= {f"groups of {k}": pivoted(left, right, neighbours=k) for k in GROUPS}
    for name, made in forms.items():
        known = rounded(made, torch.bfloat16)
        alone = off(*plain(made.left.bfloat16(), made.rest.bfloat16(), made.order))
        solved = off(*plain(known.left, known.rest, known.order))
        largest = float(made.rest.abs().max()) if made.rest.numel() else 0.0
        found[name] = {"largest": largest, "rounded": alone, "made up for": solved}
        found[name]["neighbours"] = weight.shape[1] // len(made.order)
    return found


def layer(m: int, n: int, rank: int) -> Any:
    """A model of one plain low-rank linear."""
    model = nn.Sequential(nn.Linear(n, m))
    cores = [nn.Parameter(torch.randn(m, rank)), nn.Parameter(torch.randn(rank, n))]
    install(model, ["0.weight"], TTSpec.low_rank(m, n, rank), cores)
    return model


def timed(m: int, n: int, share: float, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """How many times as fast as the plain layer at a share of the parameters the pivoted is."""
    rank = int(share * m * n / (m + n))
    more = next(r for r in range(min(m, n), 0, -1) if r * (m + n - r) <= rank * (m + n))
    before = layer(m, n, rank)
    same, equal = copy.deepcopy(before), layer(m, n, more)
    for model in (same, equal):
        tensorize.weight.pivoted(model.to(dtype))
        assert model[0].spec.pivoted
    x = torch.randn(rows, n, dtype=dtype)
    models = {"plain": before, "rank": same, "parameters": equal}
    calls = {name: partial(model.to(dtype), x) for name, model in models.items()}
    with torch.no_grad():
        times = interleaved(calls)
    return {name: times["plain"].over(times[name]) for name in ("rank", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("rounding", "time"))
    parser.add_argument("--every", type=int, default=1, help="round each so many-th weight only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = kept("pivot")
    if options.only != "time":
        results["rounding"] = {
            f"{name}, {share} of full rank": rounding(weight, share)
            for name, weight in itertools.islice(weights(), 0, None, options.every)
            for share in (0.25, 0.5, 0.7)
        }
        for form in (*map(str, BOUNDS), *(f"groups of {k}" for k in GROUPS)):
            for kind in ("rounded", "made up for"):
                over = [r[form][kind] / r["plain"] for r in results["rounding"].values()]
                print(
                    f"{form}, {kind}: median {statistics.median(over):.2f}, worst "
                    f"{max(over):.2f} of what rounding costs plain factors"
                )
    if options.only != "rounding":
        results["time"] = {}
        for m, n in SHAPES:
            for share in (0.5, 0.75):
                for rows in ROWS:
                    for dtype in (torch.float32, torch.bfloat16):
                        cell = timed(m, n, share, rows, dtype)
                        kind = str(dtype).removeprefix("torch.")
                        key = f"{m} x {n}, {share} kept, {rows} rows, {kind}"
                        results["time"][key] = cell
                        print(key, {name: round(value, 2) for name, value in cell.items()})
    print("written", keep("pivot", results))


if __name__ == "__main__":
    main()
