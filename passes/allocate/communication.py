"""What a weight makes tensor-parallel devices send for one row of input, forward and back.

Weights of low rank are split by their bottleneck: what is summed is the product with the first
factor, and its gradient. A dense weight makes them sum its outputs, or the gradient of its inputs,
whichever is the residual stream; in other formats weights count as dense ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorize.formats.dense import is_dense
from tensorize.formats.registry import named
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec

_ELEMENT = 2
"""Bytes: training sends half precision."""


def rank_sent(ranks: Any, uses: int = 1) -> Any:
    """Bytes a row for first products of so many columns."""
    return 2 * _ELEMENT * ranks * uses


def dense_sent(site: Site) -> int:
    """Bytes a row of a dense weight by itself."""
    if not _products(site):
        return 0
    rows, columns = site.matrix
    width = columns if site.input_group is not None else min(rows, columns)
    return _ELEMENT * width * _products(site)


def spec_sent(site: Site, spec: Spec) -> Any:
    """Bytes a row of a weight in a format."""
    if not is_dense(spec.format) and named(spec.format).spectral:
        return rank_sent(sum(spec.ranks), _products(site))
    return dense_sent(site)


def whole_sent(sites: Iterable[Site]) -> int:
    """Bytes a row of a dense model: weights of one input send its gradient once."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.input_group or site.name, site)
    return sum(dense_sent(site) for site in first.values())


def _products(site: Site) -> int:
    """How many of its uses multiply rows by it."""
    plain = len(site.shape) == 2
    return sum(plain and use.kind.startswith(("linear", "addmm", "matmul")) for use in site.uses)
