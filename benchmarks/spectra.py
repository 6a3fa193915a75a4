"""What every rank of one weight loses: the analysis against a plain SVD (LAPACK's gesdd).

    python -m benchmarks.spectra 4096

A random square matrix in float32, with torch's own number of threads. Ours is what the analysis
does: the eigenvalues of the smaller Gram matrix. The factors of the one rank that a plan then
chooses are timed beside it. The truncation errors of both, and of these factors, are compared with
those of the singular values in float64, at every rank that saves parameters.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.record import keep
from tensorize.algebra.metric import Metric
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import TTSpec
from tensorize.passes.curves.spectra import spectrum


def tails(squares: Tensor) -> Tensor:
    """The error ‖W − W_r‖ at r = 0, 1, … from squared singular values."""
    return squares.double().flip(0).cumsum(0).flip(0).clamp_min(0).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", type=int, nargs="?", default=4096)
    size = parser.parse_args().size
    torch.manual_seed(0)
    weight = torch.randn(size, size)
    site = Site("weight", (size, size), "float32", (Use("linear", "columns"),))
    torch.linalg.svd(weight[:64, :64])  # what is loaded on the first call is not timed

    start = time.perf_counter()
    found = spectrum(site, weight, (Metric(1.0, None, None),), ("low_rank",))
    ours = time.perf_counter() - start
    pay = (size * size - 1) // (2 * size)
    rank = pay // 2
    start = time.perf_counter()
    left, right = found.factors(TTSpec.low_rank(size, size, rank), weight)
    factors = time.perf_counter() - start
    start = time.perf_counter()
    _, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    gesdd = time.perf_counter() - start
    exact = tails(torch.linalg.svdvals(weight.double()).square())

    errors = {
        "ours": found.distortion[:pay].sqrt(),
        "gesdd": tails(sigma.square())[:pay],
    }
    worst = {k: float((e / exact[:pay] - 1).abs().max()) for k, e in errors.items()}
    worst["ours, measured on the factors"] = abs(
        float((left @ right - weight).double().norm() / exact[rank]) - 1
    )
    print(f"{size} x {size}: ours {ours:.2f} s, gesdd {gesdd:.2f} s: {gesdd / ours:.2f} x as fast")
    print(f"  the factors of rank {rank}: {factors:.2f} s more")
    for name, error in worst.items():
        print(f"  {name}: truncation error off by at most {error:.1e}")
    results = {
        "size": size, "ours": ours, "factors": factors, "gesdd": gesdd, "speedup": gesdd / ours,
        "off": worst,
    }  # fmt: skip
    print(f"kept in {keep('spectra', results)}")


if __name__ == "__main__":
    main()
